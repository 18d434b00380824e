"""Which files below a folder are text: not those of a model or a run, which stand there too.

A run may write below the folder that it reads. What it leaves there (a model card, the vocabulary
of a tokenizer) is no text of the user's, and must not move the text of a resumed run or a control.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from moe_tools.data.compressed import suffix
from moe_tools.names import CONFIG, RECIPE

logger = logging.getLogger(__name__)

DONOR = b"# donor: "
"""Begins one of the first lines of the recipe.yaml of a run (`moe_tools.runs.folder`)."""
GRID = b'{"grid": {"model": '
"""How a file of `moe-tools grid` begins (`moe_tools.runs.grid`)."""
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


def text_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of these kinds below a folder, sorted by path.

    Left out are hidden names, links to folders, every folder that holds a model, a tokenizer or a
    run of moe-tools, complete or not, and the figures of `moe-tools grid`. One line is logged of
    other files that are not read.

    Raises:
        ValueError: the folder is itself one of a model or a run, or cannot be listed.
    """
    mark = _mark(folder)
    if mark is not None:
        raise ValueError(
            f"folder {str(folder)!r} holds a model or a run ({mark}), and no text: name a folder "
            "of text, or a file in this one"
        )
    found: list[Path] = []
    unread = Counter[str]()
    for place, folders, names in os.walk(folder, onerror=_refuse):
        below = [Path(place, name) for name in folders if not name.startswith(".")]
        unread["links to folders"] += sum(path.is_symlink() for path in below)
        folders[:] = [p.name for p in below if not p.is_symlink() and _mark(p) is None]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if suffix(path) not in suffixes:
                kind = path.suffix.lower()
                unread[f"{kind} files" if kind else "files without a suffix"] += 1
            elif not path.is_file():
                unread["broken links or special files"] += 1
            elif not _head(path).startswith(GRID):
                found.append(path)
    _tell(folder, +unread)
    return sorted(found)


def _mark(folder: Path) -> str | None:
    """The file that shows that a folder holds a model, a tokenizer or a run; None: it does not."""
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return name
    if _is_config(folder / CONFIG):
        return CONFIG
    if any(line.startswith(DONOR) for line in _head(folder / RECIPE).splitlines()):
        return RECIPE
    return _weights(folder)


def _weights(folder: Path) -> str | None:
    """The first safetensors file: adapters and parts of a model come without a config.json."""
    try:
        return min((p.name for p in folder.iterdir() if p.suffix == ".safetensors"), default=None)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_config(file: Path) -> bool:
    """Whether it is that of a model: other programs have a config.json, too."""
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def _head(file: Path) -> bytes:
    """The first bytes; nothing if there is no such file."""
    try:
        with file.open("rb") as content:
            return content.read(4096)
    except OSError:
        return b""


def _refuse(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error) from error


def _unreadable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"folder {str(folder)!r} cannot be listed: {error.strerror}")


def _tell(folder: Path, unread: Counter[str]) -> None:
    if unread:
        kinds = ", ".join(f"{count} {what}" for what, count in sorted(unread.items()))
        logger.warning("%s: not read: %s", folder, kinds)
