"""A source's name -> its documents."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from moe_tools.data.docs import docs
from moe_tools.data.files import SUFFIXES, read_path
from moe_tools.data.holdout import TextSplit, check_split, divide
from moe_tools.data.hub import hub_texts

JOIN = " + "
"""Stands between the sources of a mixture."""
_OWNER_AND_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def texts(source: str, *, split: TextSplit) -> Iterator[str]:
    """The documents of a source, always in the same order.

    Args:
        source: "docs", a .txt, .md, .jsonl (field "text") or .parquet file, a folder of such files
            (hidden ones are skipped), "hub:NAME[:CONFIG]" or "owner/name" of a hub data set. A
            path wins over a hub name; a folder called docs is "./docs".
        split: "heldout" is about 5 % of the text. docs: whole files. Files: 5 % of the documents
            by hash, or the end of the text if there are fewer than 20. Hub: the data set's own
            validation or test split, else 5 % of the rows by hash.

    Raises:
        ValueError: the source is unknown, unreadable or empty.
    """
    check_split(split)
    if source == "self":
        raise ValueError(
            "source 'self' is sampled from a model and has no texts: call generate_blocks, and "
            "use 'docs' as its held-out text"
        )
    if source == "docs":
        return iter(docs(split))
    if is_hub(source):
        name, _, config = source.removeprefix("hub:").partition(":")
        return hub_texts(name, config or None, split)
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise ValueError(
            f"data source {source!r} is not there: use 'docs', 'self', an existing "
            f"{', '.join(SUFFIXES)} file, a folder of such files, or hub:NAME"
        )
    return iter(divide(read_path(path), split, source))


def is_hub(source: str) -> bool:
    """Whether the source is a stream from the hub, which may have no end worth waiting for."""
    if source.startswith("hub:"):
        return len(source) > len("hub:")
    if Path(source).expanduser().exists() or Path(source).suffix.lower() in SUFFIXES:
        return False
    return bool(_OWNER_AND_NAME.fullmatch(source)) and source[0] not in "~."


def mixture(source: str) -> list[tuple[str, float]]:
    """The sources of "a.jsonl:0.7 + b.jsonl:0.3" and their weights; without one it is 1.

    A path that exists is a source, whatever its name.

    Raises:
        ValueError: a weight that is not above 0, or a source without a name.
    """
    if Path(source).expanduser().exists():
        return [(source, 1.0)]
    return [_weighted(part) for part in source.split(JOIN)]


def _weighted(part: str) -> tuple[str, float]:
    name, colon, word = part.rpartition(":")
    try:
        weight = float(word)
    except ValueError:
        return part, 1.0
    if not colon or Path(part).expanduser().exists():
        return part, 1.0
    if not name or not 0 < weight < math.inf:
        raise ValueError(f"data source {part!r}: a weight is a number above 0, after a name")
    return name, weight
