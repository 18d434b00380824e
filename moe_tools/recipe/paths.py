"""A recipe that means the same text from any directory."""

from __future__ import annotations

from dataclasses import replace

import yaml

from moe_tools.data.sources import absolute
from moe_tools.recipe.reading import parse_recipe
from moe_tools.recipe.recipe import Recipe


def lasting(recipe: Recipe) -> Recipe:
    """The recipe, its text by absolute paths."""
    return replace(recipe, data=absolute(recipe.data))


def lasting_yaml(text: str) -> str:
    """The same of a recipe in YAML, the comments before it kept, every default spelled out.

    So runs are recognised that began when paths were kept as given, or without a newer option. What
    is no recipe any more stays as it is.
    """
    lines = text.splitlines(keepends=True)
    body = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    try:
        recipe = parse_recipe(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError):
        return text
    return "".join(lines[:body]) + lasting(recipe).to_yaml()
