"""A name for the weights of a model as they are now: it changes with them, and takes no long look.

Of every tensor the first, middle and last 4 KiB count, and all of the header, the config and Python
code: training a tensor changes its pages all over. One of which single numbers in between were
changed by hand is not told apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.hub import cached_file

from moe_tools.checkpoint.stored import stored_tensors
from moe_tools.names import CONFIG

PAGE = 4096
"""Bytes."""
PARTS = 1024
"""Of a file whose tensors are not looked up."""


def digest(source: str) -> str:
    """16 hex digits for a folder or a GGUF file, the commit for a hub id.

    Raises:
        ValueError: a weight file is missing, truncated or no safetensors file.
        OSError: nothing is there.
    """
    path = Path(source)
    if not path.exists():
        return Path(str(cached_file(source, CONFIG))).parent.name
    found = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            found.update(piece)
    return found.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """What decides which function a folder is; a card, figures or notes may come and go."""
    code = folder.glob("*.py")
    return sorted({folder / CONFIG, *code, *stored_tensors(folder).values()})


def _pieces(file: Path) -> Iterator[bytes]:
    if file.suffix in (".json", ".py"):
        yield file.read_bytes()
        return
    size = file.stat().st_size
    with file.open("rb") as opened:
        begin = 0
        starts = [size * part // PARTS for part in range(PARTS)] + [size - PAGE]
        if file.suffix == ".safetensors":
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length)
            yield header
            begin = 8 + length
            starts = _starts(json.loads(header))
        for start in starts:
            opened.seek(begin + max(start, 0))
            yield opened.read(PAGE)


def _starts(header: dict[str, dict[str, list[int]]]) -> list[int]:
    """Where the first, the middle and the last page of every tensor begin."""
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [at for first, end in spans for at in (first, (first + end) // 2, end - PAGE)]
