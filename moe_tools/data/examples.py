"""Labelled documents, or pairs of them, in the rows of a table."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_tools.data.cells import string
from moe_tools.data.paired import both, text_columns
from moe_tools.data.sources import parse_source
from moe_tools.data.tables import TABLES, Table, named_column, open_table

logger = logging.getLogger(__name__)

LABEL = "label"
"""The column that is the label, where no other is named."""


class Example(NamedTuple):
    """One labelled document, or two that are judged together."""

    text: str
    label: str | float
    """The name of a class, or a score."""
    pair: str | None = None
    """The second text."""


def read_labelled(source: str) -> list[Example]:
    """The examples of a .jsonl or .parquet file in its order; rows without text are skipped.

    Args:
        source: the file, or FILE:TEXT or FILE:TEXT:LABEL with the names of the columns; TEXT1+TEXT2
            is a pair. Without, the text is `text` or a pair of a usual name
            (`moe_tools.data.paired`), and the label is "label".

    Raises:
        ValueError: no such file, another kind, columns that are in doubt, a row without a label or
            with half of a pair, or one label only.
    """
    examples = _read(source, _name)
    if len({example.label for example in examples}) < 2:
        raise ValueError(f"{source!r} has fewer than two labels: there is nothing to tell apart")
    return examples


def read_scored(source: str) -> list[Example]:
    """The same, where every label is a number, which a regression is to find.

    Raises:
        ValueError: as `read_labelled`; or a label that is no finite number.
    """
    return _read(source, _score)


def open_labelled(source: str, needs: str, named: str) -> tuple[Table, tuple[str, ...]]:
    """The table of a source, and the columns that are named.

    Args:
        source: a .jsonl or .parquet file, with or without columns.
        needs: what its rows have, as an error says it.
        named: how its columns are named.

    Raises:
        ValueError: it is none, is not there, or names more than two columns.
    """
    found = parse_source(source)
    path = Path(found.name)
    kinds = " or ".join(TABLES)
    if found.kind != "file" or path.suffix.lower() not in TABLES or path.is_dir():
        raise ValueError(
            f"labelled data {source!r} is no {kinds} file: give one whose rows have {needs}"
        )
    if not path.is_file():
        raise ValueError(
            f"labelled data {source!r} is not there: give a {kinds} file whose rows have {needs}"
        )
    if len(found.columns) > 2:
        raise ValueError(f"labelled data {source!r} names more than two columns: {named}")
    return open_table(path), found.columns


def _read(source: str, read: Callable[[Any, str, str], str | float]) -> list[Example]:
    table, columns = open_labelled(source, f"a text and a {LABEL!r}", "FILE:TEXT:LABEL")
    kinds = table.kinds()
    label = named_column(table, kinds, columns[1] if len(columns) > 1 else LABEL)
    others = {name: kind for name, kind in kinds.items() if name != label}
    texts = text_columns(table, others, next(iter(columns), None))
    found = []
    skipped = 0
    for where, row in table.rows(*texts, label):
        said = _texts(row, texts, where)
        if said is None:
            skipped += 1
        else:
            found.append(Example(said[0], read(row.get(label), label, where), said[1]))
    if skipped:
        logger.info("%s: %d rows without text", source, skipped)
    return found


def _texts(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> tuple[str, str | None] | None:
    if len(columns) == 2:
        return both(row, (columns[0], columns[1]), where)
    said = string(row, columns[0], where)
    return None if said is None or not said.strip() else (said, None)


def _name(value: Any, column: str, where: str) -> str:
    """A class's name; 1.0 is what a table of numbers makes of 1 beside an empty cell."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(
            f"{where} has the {column} {value!r}: every text needs one that is a string or a "
            "whole number"
        )
    return string({column: str(value)}, column, where) or ""


def _score(value: Any, column: str, where: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(
            f"{where} has the {column} {value!r}: to regress, every text needs one that is a "
            "finite number; to tell names apart, use task: classify"
        )
    return score
