"""Documents in rows: .jsonl and .parquet files, and which of their columns they are in.

A document is a string. Of a conversation it is JSON that `moe_tools.data.chat` reads: so whatever
orders, divides or counts documents does it for all of them alike.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from moe_tools.data.cells import PAIR, has_turns, is_turn, pair, string, turns
from moe_tools.data.compressed import open_text, suffix
from moe_tools.extras import needed

TEXT = "text"
"""The column that is the text wherever there is one of this name."""
TABLES = (".jsonl", ".parquet")
TURNS = ("messages", "conversations")
"""Columns that are a conversation, best first, where there is no column of text."""
SEEN = 100_000
"""Rows of a .jsonl file that say what its columns hold."""
WHOLE = "is it a whole .parquet file?"

Kind = Literal["strings", "turns", "other", "unknown"]
"""What a column holds: strings, lists of turns of a conversation, or something else; unknown:
nothing but nulls was seen, so it may be strings."""
Form = Literal["text", "turns", "pair"]
"""What a document is: running text, the turns of a conversation, or a prompt and its completion."""


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
    """The documents of a table; a row whose text or conversation is null is skipped.

    Raises:
        ValueError: no column is the text beyond doubt, or a row has not in it what others have.
    """
    kinds = table.kinds()
    if not kinds:
        return
    form, columns = form_of(table, kinds, column)
    for where, row in table.rows(*columns):
        if form == "turns":
            found = turns(row, columns[0], where)
        elif form == "pair":
            found = pair(row, where)
        else:
            found = string(row, columns[0], where)
        if found is not None:
            yield found


def form_of(
    table: Table, kinds: Mapping[str, Kind], wanted: str | None
) -> tuple[Form, tuple[str, ...]]:
    """What the documents of a table are, and the columns that they are in.

    The column that was named; else `text`; else one of `TURNS`; else the two of `PAIR`; else the
    only one that can hold strings.

    Raises:
        ValueError: there is no such column, or it is in doubt which.
    """
    if wanted is not None:
        form: Form = "turns" if kinds.get(wanted) == "turns" else "text"
        return form, (named_column(table, kinds, wanted),)
    if TEXT not in kinds:
        chat = next((name for name in TURNS if kinds.get(name) == "turns"), None)
        if chat is not None:
            return "turns", (chat,)
        if all(kinds.get(name) == "strings" for name in PAIR):
            return "pair", PAIR
    return "text", (text_column(table, kinds, wanted),)


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


def kinds_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Kind]:
    """What the columns of these rows hold; one string among other values makes it strings."""
    found: dict[str, Kind] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                found[name] = "strings"
            elif value == []:
                found.setdefault(name, "unknown")
            elif isinstance(value, list) and all(map(is_turn, value)):
                found.setdefault(name, "turns")
                found[name] = "turns" if found[name] == "unknown" else found[name]
            elif value is not None and found.get(name) not in ("strings", "turns"):
                found[name] = "other"
            else:
                found.setdefault(name, "unknown")
    return found


def open_table(path: Path) -> Table:
    """The table in a .jsonl or .parquet file."""
    return Parquet(path) if suffix(path) == ".parquet" else JsonLines(path)


class JsonLines(Table):
    """A .jsonl file: one object a line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        """Opens nothing yet."""
        self.path, self.name, self.label = path, str(path), repr(str(path))

    def kinds(self) -> dict[str, Kind]:
        """By the values of the first rows, which are all of most files."""
        return kinds_of(row for _, row in itertools.islice(self.rows(), SEEN))

    def rows(self, *columns: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Whole objects."""
        # A file ends its lines at "\n": JSON strings may hold U+2028 and other ends of Unicode.
        with utf8(self.path), open_text(self.path) as lines:
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
        if types.is_list(found) or types.is_large_list(found):
            inner = found.value_type
            names = {field.name for field in inner} if types.is_struct(inner) else set()
            return "turns" if has_turns(names) else "other"
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
    """Turns what reading a text file raises, or unpacking it, into one clear line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError):
            raise
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
