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

REFUSALS = {
    errno.ENOSPC: ("no space is left on its disk", "make room"),
    errno.EDQUOT: ("your quota of its disk is used up", "make room"),
    errno.EFBIG: ("the file would be larger than is allowed here", "raise the limit (`ulimit -f`)"),
    errno.EIO: ("its disk fails (input/output error)", "see to the disk"),
    errno.EROFS: ("its file system is read-only", "choose a place that can be written to"),
}
"""What the system says -> the same in words, and the way out."""
UNSAID = ("PyTorch's writer was refused", "make room")
IN_RUST = re.compile(r"\(os error (\d+)\)")
IN_PYTORCH = re.compile(r"inline_container\.cc|PytorchStreamWriter|iostream error")
GIB = 2**30


class CannotWrite(ValueError):
    """A disk refused a file; what was complete before is still there."""


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Names the place in the error of a disk that refuses; other errors pass.

    Raises:
        CannotWrite: the disk is full, fails, is read-only, or a quota or limit is reached.
    """
    try:
        yield
    except Exception as error:
        refused = refusal(error, Path(place))
        if refused is None:
            raise
        raise refused from error


def refusal(error: Exception, place: Path | None = None) -> CannotWrite | None:
    """An error as a refusal of the disk on which `place` is; None: it is none, or is said already.

    Without a place, it is the file that the error names.
    """
    said = None if isinstance(error, CannotWrite) else _said(error)
    if said is None:
        return None
    if place is None and isinstance(error, OSError) and isinstance(error.filename, str):
        place = Path(error.filename)
    why, way_out = said
    return CannotWrite(
        f"{place or 'a file'} cannot be written: {why}{_room(place)}: {way_out} and repeat the "
        "command; what was complete is kept"
    )


def _said(error: BaseException | None) -> tuple[str, str] | None:
    """What is refused and the way out, by the error or by one that it was raised from."""
    unsaid = None
    while error is not None:
        code = _code(error)
        if code in REFUSALS:
            return REFUSALS[code]
        if code is not None and not isinstance(error, OSError):
            return os.strerror(code), "see to it"
        if isinstance(error, RuntimeError) and IN_PYTORCH.search(str(error)):
            unsaid = UNSAID
        error = error.__cause__ or error.__context__
    return unsaid


def _code(error: BaseException) -> int | None:
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
