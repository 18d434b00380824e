"""The recipes that come with moe-tools. Imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from moe_tools.registry import unknown


def recipe_path(name: str) -> Path:
    """The file of a recipe that comes with moe-tools.

    Raises:
        ValueError: no recipe of this name.
    """
    found = known_recipes()
    if name not in found:
        raise unknown("recipe", name, found)
    return found[name]


def known_recipes() -> dict[str, Path]:
    """Name -> file, in the order of the names; those of the papers' own models stand in papers/."""
    entries = [Path(str(entry)) for entry in files("moe_tools.recipes").iterdir()]
    inside = [path for entry in entries if entry.is_dir() for path in entry.rglob("*.yaml")]
    paths = [path for path in entries + inside if path.suffix == ".yaml"]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}
