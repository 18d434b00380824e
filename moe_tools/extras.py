"""Imports what only some commands need, or names the extra of moe-tools that brings it."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(module: str, extra: str, what: str) -> Any:
    """Imports a module that not every install has.

    Args:
        module: its dotted name.
        extra: the group of pyproject.toml that brings it.
        what: that wants it, as the error calls it.

    Raises:
        ValueError: its package is not installed.
    """
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:  # it is there, and lacks something itself
            raise
        raise ValueError(
            f"{what} needs {package}, which is not installed: pip install 'moe-tools[{extra}]'"
        ) from error
