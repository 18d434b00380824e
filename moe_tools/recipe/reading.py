"""Recipes from YAML: every key known, every value of its type."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from moe_tools.recipe.recipe import STEPS, Recipe
from moe_tools.registry import short, unknown
from moe_tools.steps.step import Step

T = TypeVar("T")


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        ValueError: no such file, no YAML, an unknown key, a wrong type or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; `moe-tools recipes` lists the recipes there are")
    try:
        block = yaml.load(path.read_text(), _Loader)
    except RecursionError as error:
        raise ValueError(f"{path}: too many lists or mappings inside each other") from error
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none, too
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return parse_recipe(block, str(path))


class _Loader(yaml.SafeLoader):
    """Plain data alone, and no key twice in a mapping: of two, YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def parse_recipe(block: Any, where: str = "recipe") -> Recipe:
    """A recipe from plain data; every key must be known and of its type.

    Raises:
        ValueError: as `read_recipe`.
    """
    if not isinstance(block, dict):
        raise ValueError(f"{where}: expected keys and values, not {type(block).__name__}")
    steps = block.get("steps")
    if not isinstance(steps, list):
        raise ValueError(f"{where}: `steps` must be a list")
    parsed = tuple(_parse_step(step, f"{where}: step {i}") for i, step in enumerate(steps))
    return _build(Recipe, {**block, "steps": parsed}, where)


def _parse_step(block: Any, where: str) -> Step:
    if not isinstance(block, dict) or len(block) != 1:
        raise ValueError(f"{where}: expected one `verb: {{...}}`")
    ((verb, options),) = block.items()
    if verb not in STEPS:
        raise ValueError(f"{where}: {unknown('step', str(verb), STEPS)}")
    where = f"{where} ({verb})"
    step = _build(STEPS[verb], options or {}, where)
    if step.one_of and not any(key in options for key in step.one_of):
        names = " or ".join(f"`{key}`" for key in step.one_of)
        raise ValueError(f"{where}: {names} is required")
    return step


def _build(kind: type[T], options: Any, where: str) -> T:
    if not isinstance(options, dict):
        raise ValueError(f"{where}: expected keys and values, not {short(options)}")
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{where}: {unknown('key', str(key), known)}")
        if key != "steps":
            options = {**options, key: _convert(value, hints[key], f"{where}: {key}")}
    for item in known.values():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in options:
            raise ValueError(f"{where}: `{item.name}` is required")
    return kind(**options)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value, if it is of the annotated type; an int or a YAML 1e-4 may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        listed = isinstance(value, list)
        if int in arguments and type(value) is int:  # beside float it means something else
            return value
        fits = [kind for kind in arguments if (typing.get_origin(kind) is tuple) == listed]
        return _convert(value, (fits or arguments)[0], where)
    if origin is tuple and isinstance(value, list):
        pairs = enumerate(value)
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in pairs)
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {unknown('value', str(value), map(str, arguments))}")
        return value
    if origin is dict and isinstance(value, dict):
        for key in value:
            _convert(key, arguments[0], f"{where}: key")
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    expected = origin or hint
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {expected.__name__}, not {short(value)}")
    return value
