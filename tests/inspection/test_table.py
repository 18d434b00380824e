"""Records in columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas
import pytest

from moe_tools.inspection import Table


@dataclass(frozen=True)
class Planet:
    name: str
    moons: int
    of: tuple[int, ...]


ROWS = [Planet("Earth", 1, (7,)), Planet("Mars", 2, ()), Planet("Venus", 0, (1, 2))]


def test_rows_come_back_as_they_were() -> None:
    table = Table.of(Planet, ROWS)
    assert list(table) == ROWS and table[-1] == ROWS[-1] and table[1:] == ROWS[1:]
    assert len(table) == 3 and type(table[0].moons) is int
    assert table.column("moons").tolist() == [1, 2, 0]
    assert list(table.where(table.column("moons") > 0)) == ROWS[:2]
    assert repr(table) == "<3 rows of Planet: name, moons, of>"


def test_a_data_frame_and_a_parquet_file_have_the_same_columns(tmp_path) -> None:
    table = Table.of(Planet, ROWS)
    frame = table.to_pandas()
    assert list(frame.columns) == ["name", "moons", "of"]
    assert frame.moons.tolist() == [1, 2, 0] and frame.of.tolist() == [(7,), (), (1, 2)]
    table.to_parquet(tmp_path / "planets.parquet")
    again = pandas.read_parquet(tmp_path / "planets.parquet")
    assert again.name.tolist() == ["Earth", "Mars", "Venus"]
    assert [tuple(of) for of in again.of] == frame.of.tolist()


def test_a_file_that_is_there_stays(tmp_path) -> None:
    (tmp_path / "planets.parquet").write_text("mine")
    with pytest.raises(ValueError, match=r"planets.parquet exists: choose another name"):
        Table.of(Planet, ROWS).to_parquet(tmp_path / "planets.parquet")
    assert (tmp_path / "planets.parquet").read_text() == "mine"


def test_no_row_is_a_table_too() -> None:
    empty = Table.of(Planet, [])
    assert list(empty) == [] and list(empty.to_pandas().columns) == ["name", "moons", "of"]
    with pytest.raises(IndexError):
        empty[0]
    assert isinstance(empty.column("moons"), np.ndarray)
