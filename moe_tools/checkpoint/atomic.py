"""Writes files and folders completely or not at all.

What is being written has a hidden name beside its target, and is renamed when it is whole. A
process that is killed leaves the hidden name behind; the next to write the same target replaces it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`: renamed to it on success, removed on an error.

    Raises:
        ValueError: `folder` exists and is not empty.
    """
    target = Path(folder)
    check_free(target)
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: str | Path) -> None:
    """Checks, before the work that fills it, that `new_folder` can make a folder.

    Raises:
        ValueError: it exists and is not empty.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty: choose another folder")


@contextmanager
def new_file(file: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `file`: renamed to it on success, removed on an error.

    A file that is there already stays as it is until then, and is replaced.
    """
    target = Path(file)
    partial = partial_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """The temporary path of `target` while it is being written."""
    return target.with_name(f".{target.name}.partial")
