"""A disk that refuses to take a file, in one line, whichever library passed it on.

Python raises an `OSError`, Rust (safetensors, tokenizers) an error of its own that ends in
`(os error 28)`, and PyTorch a `RuntimeError` that does not say why.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of a file (`ulimit -f`)",
    errno.EIO: "see to the disk",
    errno.EROFS: "choose a place that can be written to",
}
"""What the system says, where it refuses -> what to do about it."""
IN_RUST = re.compile(r"\(os error (\d+)\)")
IN_PYTORCH = re.compile(r"inline_container\.cc|PytorchStreamWriter|iostream error")
UNSAID = "PyTorch could not write it"
GIB = 2**30


class CannotWrite(ValueError):
    """A disk refused a file; what was complete before is still there."""


class Refusal(NamedTuple):
    """Why a disk refuses."""

    reason: str
    """With the room that is left."""
    way_out: str


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Names the place in the error of a disk that refuses; other errors pass.

    Raises:
        CannotWrite: the disk is full, fails, is read-only, or a quota or limit is reached.
    """
    try:
        yield
    except Exception as error:
        refused = cannot_write(error, Path(place))
        if refused is None:
            raise
        raise refused from error


def cannot_write(error: Exception, place: Path | None = None) -> CannotWrite | None:
    """An error as a refusal of `place`, or of the file that it names; None: it is none."""
    if place is None and isinstance(error, OSError) and isinstance(error.filename, str):
        place = Path(error.filename)
    refused = refusal(error, place)
    return refused and CannotWrite(
        f"{place or 'a file'} cannot be written: {refused.reason}: {refused.way_out} and repeat "
        "the command; what was complete is kept"
    )


def refusal(error: Exception, place: Path | None) -> Refusal | None:
    """Why the disk of `place` refuses; None: it does not, or a ValueError says it already."""
    if isinstance(error, ValueError):
        return None
    code = _code(error)
    if isinstance(error, RuntimeError) and IN_PYTORCH.search(str(error)):
        code = _code(error.__context__)  # where it wrote to a file that Python has opened
        if code is None:
            return Refusal(UNSAID + _room(place), "make room")
    if code not in WAYS_OUT:
        return None
    return Refusal(os.strerror(code) + _room(place), WAYS_OUT[code])


def _code(error: BaseException | None) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = IN_RUST.search(str(error))
    return None if found is None else int(found[1])


def _room(place: Path | None) -> str:
    """How much is free where a place is, or would be."""
    for folder in () if place is None else (place, *place.absolute().parents):
        with suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / GIB:.2f} GiB are free)"
    return ""
