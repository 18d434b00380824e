"""Rows of a table that hold two texts: a pair to judge, or a source and its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_tools.data.cells import PAIR, string
from moe_tools.data.tables import TEXT, Kind, Table, named_column, text_column

PLUS = "+"
"""Stands between the two columns of a pair, where they are named: FILE:TEXT1+TEXT2:LABEL."""
PAIRS = (
    ("sentence1", "sentence2"),  # MRPC, RTE, STS-B, WNLI
    ("premise", "hypothesis"),  # MNLI, CB
    ("question", "sentence"),  # QNLI
    ("question1", "question2"),  # QQP
    ("question", "passage"),  # BoolQ
)
"""Columns that together are a pair, best first, where there is no column of text."""
SIDES = (
    ("source", "target"),
    ("input", "target"),
    ("inputs", "targets"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "highlights"),
    PAIR,
)
"""Columns that are what an encoder reads and what a decoder is to say, best first."""


def text_columns(table: Table, kinds: Mapping[str, Kind], wanted: str | None) -> tuple[str, ...]:
    """The column of the text, or the two of a pair.

    What was named: a column, or two with `PLUS` between; a column whose own name has one wins.
    Else `text`; else one of `PAIRS`; else the only column that can hold strings.

    Raises:
        ValueError: there is no such column, more than two are named, or it is in doubt which.
    """
    if wanted is not None and wanted not in kinds and PLUS in wanted:
        names = wanted.split(PLUS)
        if len(names) != 2:
            raise ValueError(
                f"{table.label}: {wanted!r} names {len(names)} columns, but a pair is two: "
                f"FILE:TEXT1{PLUS}TEXT2:LABEL"
            )
        return tuple(named_column(table, kinds, name) for name in names)
    if wanted is None and TEXT not in kinds:
        found = _first(PAIRS, kinds)
        if found is not None:
            return found
    return (text_column(table, kinds, wanted),)


def side_columns(
    table: Table, kinds: Mapping[str, Kind], columns: tuple[str, ...]
) -> tuple[str, str]:
    """The columns of the source and of the target: those that were named, else one of `SIDES`.

    Raises:
        ValueError: there is no such column, one or more than two are named, or none is known.
    """
    if len(columns) == 2:
        source, target = (named_column(table, kinds, name) for name in columns)
        return source, target
    if columns:
        raise ValueError(
            f"{table.label}: {':'.join(columns)!r} names {len(columns)} columns, but a source and "
            "a target are two: FILE:SOURCE:TARGET"
        )
    found = _first(SIDES, kinds)
    if found is None:
        known = ", ".join("/".join(pair) for pair in SIDES)
        raise ValueError(
            f"{table.label} has no two columns of strings that are a source and its target "
            f"(known: {known}; columns: {', '.join(kinds) or 'none'}): name yours, "
            "FILE:SOURCE:TARGET"
        )
    return found


def both(row: Mapping[str, Any], columns: tuple[str, str], where: str) -> tuple[str, str] | None:
    """The two texts of a row; None: it has neither.

    Raises:
        ValueError: one of them is null or blank, or something else than a string.
    """
    first, second = (string(row, column, where) or "" for column in columns)
    if not first.strip() and not second.strip():
        return None
    for column, text, other in ((columns[0], first, columns[1]), (columns[1], second, columns[0])):
        if not text.strip():
            raise ValueError(
                f"{where} has text in {other!r} and none in {column!r}: every row must have both, "
                "or neither"
            )
    return first, second


def _first(known: tuple[tuple[str, str], ...], kinds: Mapping[str, Kind]) -> tuple[str, str] | None:
    """The first of these that are there; one of the two may have nothing but nulls."""
    for pair in known:
        found = {kinds.get(name) for name in pair}
        if found <= {"strings", "unknown"} and "strings" in found:
            return pair
    return None
