"""Labelled documents in the rows of a table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_tools.data.sources import parse_source
from moe_tools.data.tables import TABLES, Table, named_column, open_table, string, text_column

logger = logging.getLogger(__name__)

LABEL = "label"
"""The column that is the label, where no other is named."""


class Example(NamedTuple):
    """One labelled document."""

    text: str
    label: str


def read_labelled(source: str) -> list[Example]:
    """The examples of a .jsonl or .parquet file in its order; rows without text are skipped.

    Args:
        source: the file, or FILE:TEXT or FILE:TEXT:LABEL with the names of the columns. Without,
            the text is chosen as for running text (`moe_tools.data.texts`), and the label is
            "label".

    Raises:
        ValueError: no such file, another kind, columns that are in doubt, a row without a label, or
            one label only.
    """
    table, columns = _open(source)
    kinds = table.kinds()
    label = named_column(table, kinds, columns[1] if len(columns) > 1 else LABEL)
    others = {name: kind for name, kind in kinds.items() if name != label}
    text = text_column(table, others, next(iter(columns), None))
    found = [_example(row, text, label, where) for where, row in table.rows(text, label)]
    examples = [example for example in found if example is not None]
    if len(examples) < len(found):
        logger.info("%s: %d rows without text", source, len(found) - len(examples))
    if len({example.label for example in examples}) < 2:
        raise ValueError(f"{source!r} has fewer than two labels: there is nothing to tell apart")
    return examples


def _open(source: str) -> tuple[Table, tuple[str, ...]]:
    found = parse_source(source)
    path = Path(found.name)
    if found.kind != "file" or path.suffix.lower() not in TABLES or path.is_dir():
        raise ValueError(
            f"labelled data {source!r} is no {' or '.join(TABLES)} file: give one whose rows have "
            f"a text and a {LABEL!r}"
        )
    if not path.is_file():
        raise ValueError(
            f"labelled data {source!r} is not there: give a {' or '.join(TABLES)} file whose rows "
            f"have a text and a {LABEL!r}"
        )
    if len(found.columns) > 2:
        raise ValueError(f"labelled data {source!r} names more than two columns: FILE:TEXT:LABEL")
    return open_table(path), found.columns


def _example(row: Mapping[str, Any], text: str, label: str, where: str) -> Example | None:
    said = string(row, text, where)
    if said is None or not said.strip():
        return None
    return Example(said, _label(row.get(label), label, where))


def _label(value: Any, column: str, where: str) -> str:
    """A class's name; 1.0 is what a table of numbers makes of 1 beside an empty cell."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(
            f"{where} has the {column} {value!r}: every text needs one that is a string or a "
            "whole number"
        )
    return string({column: str(value)}, column, where) or ""
