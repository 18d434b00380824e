"""Documents in rows: .jsonl and .parquet files, and which of their columns is the text."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from moe_tools.extras import needed

TEXT = "text"
"""The column that is the text wherever there is one of this name."""
TABLES = (".jsonl", ".parquet")
WHOLE = "is it a whole .parquet file?"

Kind = Literal["strings", "other", "unknown"]
"""What a column holds; unknown: nothing but nulls was seen, so it may be strings."""


class Table(ABC):
    """Rows with named columns."""

    name: str
    """As a source, without a column."""
    label: str
    """As an error calls it."""

    @abstractmethod
    def kinds(self) -> dict[str, Kind]:
        """What each column holds: by the schema where there is one, else by the rows."""

    @abstractmethod
    def rows(self, *columns: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every row, with at least these columns where it has them, and where it stands."""

    def spelled(self, *columns: str) -> str:
        """The source that names columns; the weight keeps a number from being read as one."""
        source = ":".join([self.name, *columns])
        return f"{source}:1" if _is_number(source.rpartition(":")[2]) else source


def documents(table: Table, column: str | None = None) -> Iterator[str]:
    """The texts of a table; a row whose text is null is skipped.

    Raises:
        ValueError: no column is the text beyond doubt, or a row has no string in it.
    """
    kinds = table.kinds()
    if not kinds:
        return
    chosen = text_column(table, kinds, column)
    for where, row in table.rows(chosen):
        text = string(row, chosen, where)
        if text is not None:
            yield text


def text_column(table: Table, kinds: Mapping[str, Kind], wanted: str | None) -> str:
    """The column that was named, else `text`, else the only one that can hold strings.

    Raises:
        ValueError: there is no such column, or there are several.
    """
    if wanted is not None:
        return named_column(table, kinds, wanted)
    if TEXT in kinds:
        return TEXT
    strings = [name for name, kind in kinds.items() if kind != "other"]
    if len(strings) == 1:
        return strings[0]
    way_out = (
        f"say which is the text, e.g. {table.spelled(strings[-1])!r}"
        if strings
        else f"give it a column {TEXT!r}"
    )
    raise ValueError(
        f"{table.label} has no column {TEXT!r} and {len(strings)} other columns of strings "
        f"(columns: {_names(kinds)}): {way_out}"
    )


def named_column(table: Table, kinds: Mapping[str, Kind], wanted: str) -> str:
    """The column of that name.

    Raises:
        ValueError: there is none.
    """
    if wanted not in kinds:
        raise ValueError(
            f"{table.label} has no column {wanted!r} (columns: {_names(kinds)}): name one "
            "that it has"
        )
    return wanted


def string(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """A row's text; None: it is null.

    Raises:
        ValueError: it is missing, no string, or no Unicode.
    """
    text = row.get(column)
    if text is None and column in row:
        return None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no string "{column}": every row must have one, or null')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where} has half of a surrogate pair in "{column}": repair it'
        ) from error
    return text


def kinds_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Kind]:
    """What the columns of these rows hold; one string among other values makes it strings."""
    found: dict[str, Kind] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                found[name] = "strings"
            elif value is not None and found.get(name) != "strings":
                found[name] = "other"
            else:
                found.setdefault(name, "unknown")
    return found


def open_table(path: Path) -> Table:
    """The table in a .jsonl or .parquet file."""
    return Parquet(path) if path.suffix.lower() == ".parquet" else JsonLines(path)


class JsonLines(Table):
    """A .jsonl file: one object a line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        """Opens nothing yet."""
        self.path, self.name, self.label = path, str(path), repr(str(path))

    def kinds(self) -> dict[str, Kind]:
        """By the values of all rows."""
        return kinds_of(row for _, row in self.rows())

    def rows(self, *columns: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Whole objects."""
        # A file ends its lines at "\n": JSON strings may hold U+2028 and other ends of Unicode.
        with utf8(self.path), self.path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{self.label} line {number}"
                    yield where, _object(line, where)


class Parquet(Table):
    """A .parquet file."""

    def __init__(self, path: Path) -> None:
        """Opens nothing yet."""
        self.path, self.name, self.label = path, str(path), repr(str(path))
        self.pyarrow = needed("pyarrow", "data", self.label)
        self.parquet = needed("pyarrow.parquet", "data", self.label)

    def kinds(self) -> dict[str, Kind]:
        """By the schema."""
        with one_line(self.label, WHOLE), self.parquet.ParquetFile(self.path) as file:
            schema = file.schema_arrow
        twice = sorted(name for name, count in Counter(schema.names).items() if count > 1)
        if twice:
            raise ValueError(f"{self.label} has the column {twice[0]!r} twice: rename one")
        return {field.name: self._kind(field.type) for field in schema}

    def _kind(self, found: Any) -> Kind:
        types = self.pyarrow.types
        if types.is_dictionary(found):
            found = found.value_type
        if types.is_string(found) or types.is_large_string(found) or types.is_string_view(found):
            return "strings"
        return "unknown" if types.is_null(found) else "other"

    def rows(self, *columns: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """These columns alone."""
        number = 0
        with one_line(self.label, WHOLE), self.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{self.label} row {number}", row


@contextmanager
def utf8(path: Path) -> Iterator[None]:
    """Turns what reading a text file raises into one clear line."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not readable UTF-8 text: {error}") from error


@contextmanager
def one_line(label: str, way_out: str) -> Iterator[None]:
    """Turns whatever a reader of files, the hub or the network raise into one clear line."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"{label} cannot be read: {reason[:300]} ({way_out})") from error


def _names(kinds: Mapping[str, Kind]) -> str:
    return ", ".join(name if name.isprintable() else ascii(name) for name in kinds) or "none"


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): one object a line is needed") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where} is no object: every line must be {{"{TEXT}": "..."}}')
    return row


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
