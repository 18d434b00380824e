"""The model class in `config.json`: a folder that only we compute names one that no program has.

llama.cpp's converter, Ollama, vLLM and SGLang choose their code by `architectures`. They know no
routers, and many compute SiLU in a llama whatever activation the config names. A routed folder, or
one of another activation, or with thresholds on inputs, says `MoeToolsLlamaForCausalLM` there: they
refuse it by that name. transformers itself chooses by `model_type`, and loads the folder as ever.

A folder that selects neurons by the prompt keeps its stock name. Its weights are the donor's, and
any program computes the donor: slower than was asked for, but the model that the selection stands
in for. A refusal would protect from nothing.

The name is one of files alone: writing puts it in, reading takes it out, so that what looks a class
of transformers up by its name finds it. Folders with the stock name are read for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_tools.checkpoint.seams import function_of

PREFIX = "MoeTools"


def stock_class(name: str) -> str:
    """The name of the stock class: what stands in `config.json`, without our prefix."""
    return str(name).removeprefix(PREFIX)


def only_ours(block: Any) -> bool:
    """Whether the block of a config has routers, another activation, or inputs that are dropped."""
    wanted = ("router", "activation", "thresholds")
    return isinstance(block, dict) and any(block.get(key) is not None for key in wanted)


def put_in(in_force: Callable[[], bool], held: Any) -> Any:
    """Wraps the method of a config that writes `config.json`."""
    write = function_of(held)

    @functools.wraps(write)
    def to_json_file(config: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_force() or getattr(config, "moe_tools", None) is None:
            return write(config, *args, **kwargs)
        with _prefixed(config):
            return write(config, *args, **kwargs)

    return to_json_file


def take_out(in_force: Callable[[], bool], held: Any) -> Any:
    """Wraps the class method of a config that reads `config.json`."""
    read = function_of(held)

    @functools.wraps(read)
    def get_config_dict(*args: Any, **kwargs: Any) -> Any:
        config, unused = read(*args, **kwargs)
        if in_force():
            _name_stock_classes(config)
        return config, unused

    kind: Any = classmethod if isinstance(held, classmethod) else staticmethod
    return kind(get_config_dict)


@contextmanager
def _prefixed(config: Any) -> Iterator[None]:
    """While it lasts, a config and that of its language model name classes that no program has."""
    parts = [
        part
        for part in (config, config.get_text_config())
        if only_ours(getattr(part, "moe_tools", None))
    ]
    before = [part.architectures for part in parts]
    try:
        for part, names in zip(parts, before, strict=True):
            if isinstance(names, list):
                part.architectures = [PREFIX + stock_class(name) for name in names]
        yield
    finally:
        for part, names in zip(parts, before, strict=True):
            part.architectures = names


def _name_stock_classes(config: Any) -> None:
    """Takes our prefix out of the JSON of a config and of its parts, in place."""
    if isinstance(config, dict):
        if isinstance(names := config.get("architectures"), list):
            config["architectures"] = [stock_class(name) for name in names]
        for part in config.values():
            _name_stock_classes(part)
