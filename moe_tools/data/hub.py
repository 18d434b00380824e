"""Documents that the `datasets` library reads: hub data sets (streamed) and parquet files."""

import glob
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_tools.data.holdout import TextSplit, is_held_out, normalise
from moe_tools.extras import needed

HELDOUT_NAMES = ("validation", "test")
"""Splits of a hub data set that are held out already, best first."""


def hub_texts(name: str, config: str | None, split: TextSplit) -> Iterator[str]:
    """Stream the documents of a hub data set, in its order.

    Training text is the split "train". Held-out text is "validation", else "test", else those 5 %
    of the rows of "train" that a hash of their text selects (train then skips them).

    Raises:
        ValueError: the data set cannot be reached or has no split "train" or no text column.
    """
    label = f"hub data set {name!r}"
    datasets = needed("datasets", "data", label)
    with _one_line(label):
        parts = datasets.load_dataset(name, config, streaming=True)
    if "train" not in parts:
        raise ValueError(f"{label} has no split 'train', only {', '.join(map(str, parts))}")
    own = next((part for part in HELDOUT_NAMES if part in parts), None)
    if own:
        return _rows(parts["train" if split == "train" else own], label)
    wanted = split == "heldout"
    rows = _rows(parts["train"], label)
    return (text for text in rows if is_held_out(normalise(text)) == wanted)


def parquet_texts(path: Path) -> Iterator[str]:
    """The documents of a parquet file.

    Raises:
        ValueError: the file is malformed or has no text column.
    """
    label = repr(str(path))
    datasets = needed("datasets", "data", label)
    with _one_line(label):
        parts = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path.absolute())), streaming=True
        )
    return _rows(parts["train"], label)


def _rows(dataset: Any, label: str) -> Iterator[str]:
    """The text column, row by row; rows without text are skipped."""
    # The network is only touched by next(), so that every step can fail.
    rows = iter(dataset)
    with _one_line(label):
        first = next(rows, None)
    if first is None:
        return
    column = _text_column(first, label)
    with _one_line(label):
        for row in itertools.chain([first], rows):
            if isinstance(row[column], str) and row[column].strip():
                yield row[column]


def _text_column(row: dict[str, Any], label: str) -> str:
    """The column "text", else the only one that holds a string."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise ValueError(
        f"{label} has no column 'text' and {len(strings)} other columns of strings "
        f"(columns: {', '.join(row)}): rename one of them to 'text'"
    )


@contextmanager
def _one_line(label: str) -> Iterator[None]:
    """Turn whatever `datasets`, the hub or the network raise into one clear line."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{label} cannot be read: {reason[:300]} (check its name and the network, "
            "or use a local file or 'docs')"
        ) from error
