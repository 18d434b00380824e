"""A source's name -> its documents."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_tools.data.cells import words
from moe_tools.data.compressed import suffix
from moe_tools.data.docs import docs
from moe_tools.data.files import SUFFIXES, form_of_path, read_path
from moe_tools.data.holdout import TextSplit, check_split, divide
from moe_tools.data.hub import HubText
from moe_tools.data.tables import Form

SELF = (
    "source 'self' is sampled from a model and has no texts: call generate_blocks, and use 'docs' "
    "as its held-out text"
)
JOIN = " + "
"""Stands between the sources of a mixture."""
_OWNER_AND_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One source, taken apart."""

    kind: Literal["docs", "self", "hub", "file"]
    """A folder is a file, too."""
    name: str
    """A path, or the name of a hub data set."""
    config: str | None = None
    """Of a hub data set."""
    columns: tuple[str, ...] = ()
    """Of its tables: the text, then the label."""

    @property
    def column(self) -> str | None:
        """The one of running text, whose name may hold colons; None: it goes without saying."""
        return ":".join(self.columns) or None


def texts(source: str, *, split: TextSplit) -> Iterator[str]:
    """The documents of a source, always in the same order.

    Args:
        source: "docs", a .txt, .md, .jsonl or .parquet file, a folder of such files (without
            hidden ones and folders of models and runs), "hub:NAME[:CONFIG]" or "owner/name" of a
            hub data set. A path wins over a hub name; a folder called docs is "./docs". The text of
            a table is its column "text", else the only one of strings, else the one named behind
            it: "FILE:COLUMN", "hub:NAME:CONFIG:COLUMN" (CONFIG may be empty).
        split: "heldout" is about 5 % of the text. docs: whole files. Files: 5 % of the documents
            by hash, or the end of the text if there are fewer than 20. Hub: the data set's own
            validation or test split, else 5 % of the rows by hash.

    Raises:
        ValueError: the source is unknown, unreadable or empty, or it is in doubt which column is
            the text.
    """
    check_split(split)
    found = parse_source(source)
    if found.kind == "self":
        raise ValueError(SELF)
    if found.kind == "docs":
        return iter(docs(split))
    if found.kind == "hub":
        return iter(HubText(found.name, found.config, split, found.column))
    _check_there(found, source)
    path, column = Path(found.name), found.column
    said = None if form_of_path(path, column) == "text" else words
    return divide(lambda: read_path(path, column), split, source, said)


def form(source: str) -> Form:
    """What the documents of a source are: running text, conversations, or prompts and completions.

    Raises:
        ValueError: as `texts`.
    """
    found = parse_source(source)
    if found.kind == "self":
        raise ValueError(SELF)
    if found.kind == "hub":
        return HubText(found.name, found.config, "train", found.column).form
    if found.kind != "file":
        return "text"
    _check_there(found, source)
    return form_of_path(Path(found.name), found.column)


def _check_there(found: Source, source: str) -> None:
    if not _is_path(found.name):
        raise ValueError(
            f"data source {source!r} is not there: use 'docs', 'self', an existing "
            f"{', '.join(SUFFIXES)} file, a folder of such files, or hub:NAME"
        )


def parse_source(source: str) -> Source:
    """Takes a source apart: a path that exists, then a hub name, then a path that is missing."""
    if source in ("docs", "self"):
        return Source("docs" if source == "docs" else "self", source)
    if source.startswith("hub:") and len(source) > len("hub:"):
        name, *rest = source.removeprefix("hub:").split(":")
        return Source("hub", name, next(iter(rest), None) or None, tuple(rest[1:]))
    # A path may hold colons itself, so the longest that is there wins.
    parts = source.split(":")
    cuts = [(":".join(parts[:n]), tuple(parts[n:])) for n in range(len(parts), 0, -1)]
    there = [cut for cut in cuts if _is_path(cut[0])]
    named = [cut for cut in cuts if suffix(Path(cut[0])) in SUFFIXES]
    if not there and not named and _is_hub_name(source):
        return Source("hub", source)
    name, columns = next(iter([*there, *named]), (source, ()))
    return Source("file", os.path.expanduser(name), columns=columns)


def _is_hub_name(source: str) -> bool:
    return bool(_OWNER_AND_NAME.fullmatch(source)) and source[0] not in "~."


def is_hub(source: str) -> bool:
    """Whether the source is a stream from the hub, which may have no end worth waiting for."""
    return parse_source(source).kind == "hub"


def absolute(source: str) -> str:
    """The same text, or mixture, from any directory: its paths are absolute."""
    # Not realpath(): a link may have the suffix that its target, in a cache, lacks.
    return _with_paths(source, os.path.abspath)


def shortened(source: str) -> str:
    """A source, or mixture, for others to read: of a path its last part, as the rest is private."""
    return _with_paths(source, lambda path: os.path.basename(os.path.abspath(path)))


def _with_paths(source: str, change: Callable[[str], str]) -> str:
    return JOIN.join(_with_path(part, change) for part in _parts(source))


def _with_path(part: str, change: Callable[[str], str]) -> str:
    name = _weighted(part)[0]
    found = parse_source(name)
    if found.kind != "file" or not name:
        return part
    return ":".join([change(found.name), *found.columns]) + part.removeprefix(name)


def mixture(source: str) -> list[tuple[str, float]]:
    """The sources of "a.jsonl:0.7 + b.jsonl:0.3" and their weights; without one it is 1.

    A path that exists is a source, whatever its name.

    Raises:
        ValueError: a weight that is not above 0, or a source without a name.
    """
    return [_weighted(part) for part in _parts(source)]


def _parts(source: str) -> list[str]:
    return [source] if _is_path(source) else source.split(JOIN)


def _weighted(part: str) -> tuple[str, float]:
    name, colon, word = part.rpartition(":")
    try:
        weight = float(word)
    except ValueError:
        return part, 1.0
    if not colon or _is_path(part):
        return part, 1.0
    if not name or not 0 < weight < math.inf:
        raise ValueError(f"data source {part!r}: a weight is a number above 0, after a name")
    return name, weight


def _is_path(source: str) -> bool:
    # Not Path.exists(), which raises for a name as long as a mixture may be.
    return os.path.exists(os.path.expanduser(source))
