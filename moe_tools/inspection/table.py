"""Stores records in columns: a sequence of dataclasses that takes the memory of its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from moe_tools.atomic import new_file
from moe_tools.extras import needed

if TYPE_CHECKING:
    import pandas

R = TypeVar("R")


class Table(Sequence[R], Generic[R]):
    """Rows of one dataclass `kind`, whose fields are the columns.

    A row is made when it is asked for; a slice is a list of rows.
    """

    def __init__(self, kind: type[R], columns: Mapping[str, Any]) -> None:
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        assert list(columns) == names, (list(columns), names)
        self.kind = kind
        self._columns = {name: np.asarray(columns[name]) for name in names}
        assert len({len(column) for column in self._columns.values()}) == 1

    @classmethod
    def of(cls, kind: type[R], rows: Iterable[R]) -> Table[R]:
        """Makes a table from rows."""
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        made = list(rows)
        return cls(kind, {name: _column([getattr(row, name) for row in made]) for name in names})

    def column(self, name: str) -> np.ndarray:
        """The values of one field, row by row."""
        return self._columns[name]

    def where(self, keep: np.ndarray) -> Table[R]:
        """The rows at which a boolean array is true, or those of an array of indices."""
        return Table(self.kind, {name: column[keep] for name, column in self._columns.items()})

    def to_pandas(self) -> pandas.DataFrame:
        """Makes a data frame with a column for each field."""
        pandas = needed("pandas", "inspect", "a data frame")
        return pandas.DataFrame(
            {
                name: list(column) if column.dtype == object else column
                for name, column in self._columns.items()
            }
        )

    def to_parquet(self, file: str | Path) -> None:
        """Writes a Parquet file: complete or not at all.

        Raises:
            ValueError: the file exists.
        """
        if Path(file).exists():
            raise ValueError(f"{file} exists: choose another name, or remove it")
        needed("pyarrow", "inspect", "a Parquet file")
        with new_file(file) as partial:
            self.to_pandas().to_parquet(partial, index=False)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __iter__(self) -> Iterator[R]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> list[R]: ...
    def __getitem__(self, index: int | slice) -> R | list[R]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.kind(**{name: _plain(column[index]) for name, column in self._columns.items()})

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {self.kind.__name__}: {', '.join(self._columns)}>"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _column(values: list[Any]) -> np.ndarray:
    """An array of numbers or of words; of whole tuples where the rows have some."""
    if any(isinstance(value, tuple | str) or value is None for value in values):
        column = np.empty(len(values), dtype=object)
        column[:] = values
        return column
    return np.asarray(values)
