"""Writes files and folders completely or not at all, and one process at a time.

What is being written has a hidden name beside its target, and is renamed when it is whole. A
process that is killed leaves the hidden name behind; the next to write the same target replaces it.

What is renamed is on the disk before: after a power cut, too, a name has its whole content.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_tools.disk import writing
from moe_tools.lock import LOCK, held, locked

PARTIAL = re.compile(r"\.(.+)\.partial")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`: renamed to it on success, removed on an error.

    Raises:
        ValueError: `folder` exists and is not empty, another process is writing it, or the disk
            refuses it.
    """
    target = Path(folder)
    check_free(target)
    partial = partial_of(target)
    with writing(_finished(target)):
        partial.mkdir(parents=True, exist_ok=True)
        with held(target, file=target.with_name(f".{target.name}{LOCK}")):
            check_free(target)  # another may have been faster
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                settle(partial)
                check_free(target)
                partial.rename(target)
                settle(target.parent, deep=False)
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

    A file that is there already stays as it is until then, and is replaced. The temporary one is
    there, empty and locked; what replaces it has no lock, and needs none in a folder that is held.

    Raises:
        ValueError: another process is writing it, or the disk refuses it.
    """
    target = Path(file)
    partial = partial_of(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(partial) as descriptor:
            try:
                os.ftruncate(descriptor, 0)
                yield partial
                settle(partial)
                partial.replace(target)
                settle(target.parent, deep=False)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none; what was there is replaced at once.

    Of a folder, every file in it.
    """
    if source.is_dir():
        for inner in source.iterdir():
            link(inner, target / inner.name)
        return
    if target.exists() and target.samefile(source):
        return
    with new_file(target) as partial:
        partial.unlink()
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def remove_folder(folder: Path) -> None:
    """Removes a folder of which no part may be taken for the whole: first it loses its name.

    One that was being removed when its process was killed goes, too.
    """
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        folder.rename(partial)
        shutil.rmtree(partial)


def settle(path: Path, *, deep: bool = True) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if deep and path.is_dir():
        for inner in path.iterdir():
            settle(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise  # the others say that this file system knows no such promise
    finally:
        os.close(descriptor)


def partial_of(target: Path) -> Path:
    """The temporary path of `target` while it is being written."""
    return target.with_name(f".{target.name}.partial")


def _finished(target: Path) -> Path:
    """What a target is called in the end, where it is a part of one that is being written."""
    partial = PARTIAL.fullmatch(target.name)
    return target if partial is None else target.with_name(partial[1])
