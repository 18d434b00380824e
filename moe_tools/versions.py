"""Refuses packages that are too old, by their metadata alone: nothing is imported for it."""

from __future__ import annotations

import re
from importlib import metadata

FLOORS = {"torch": "2.9", "transformers": "5.7"}
"""The lowest versions that are tested, as in pyproject.toml: pip sees to it, but not if asked to
leave out dependencies, nor in an image whose packages were changed afterwards."""


def check_versions() -> None:
    """Checks torch and transformers. One that is missing is named by the import that wants it.

    Raises:
        ImportError: one is older than its floor.
    """
    for name, floor in FLOORS.items():
        found = _installed(name)
        if found is not None and _release(found) < _release(floor):
            raise ImportError(
                f"{name} {found} is installed, and moe-tools needs {floor} or later: "
                f"pip install '{name}>={floor}'"
            )


def _installed(name: str) -> str | None:
    """None: it is not installed, or as a bare folder without metadata."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Its leading numbers: images carry builds like 2.11.0a0+43c6f9c."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()
