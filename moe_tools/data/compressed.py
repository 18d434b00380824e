"""Files of text, plain or compressed: the suffix before .gz or .zst says what is inside."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moe_tools.extras import needed

COMPRESSED = (".gz", ".zst")


def suffix(path: Path) -> str:
    """The kind of a file by its name, in lower case: .jsonl of both a.jsonl and A.JSONL.GZ."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Opens a file as UTF-8, with or without a mark in front; it is unpacked as it is read.

    Raises:
        OSError: it cannot be read, or is no such archive.
        ValueError: what unpacks it is not installed.
    """
    with path.open("rb") as raw, _unpacked(path, raw) as inner:
        yield io.TextIOWrapper(inner, encoding="utf-8-sig")


def _unpacked(path: Path, raw: IO[bytes]) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(raw)
        case ".zst":
            zstandard = needed("zstandard", "data", repr(str(path)))
            return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        case _:
            return raw
