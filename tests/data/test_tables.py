"""Which column of a table is its text: by all of it, and never by its first row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.data import texts
from moe_tools.data.hub import Stream
from moe_tools.data.sources import mixture
from moe_tools.data.tables import JsonLines, Parquet, Table, documents, kinds_of

WORDS = st.text("abc ", min_size=1)
COLUMNS = st.dictionaries(
    st.sampled_from(["text", "id", "content", "n", "1"]),
    st.sampled_from(
        [WORDS, st.none() | WORDS, st.none() | st.integers(0, 9), st.none() | st.booleans()]
    ),
    min_size=1,
)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of one kind a column, some of them null."""
    columns = draw(COLUMNS)
    return draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=12))


def tables(folder: Path, found: list[dict[str, Any]]) -> Iterator[Table]:
    """The same rows in every kind of table."""
    lines, parquet = folder / "a.jsonl", folder / "a.parquet"
    lines.write_text("\n".join(json.dumps(row) for row in found))
    arrow = pa.Table.from_pylist(found)
    pq.write_table(arrow, parquet)
    yield JsonLines(lines)
    yield Parquet(parquet)
    yield Stream(datasets.Dataset(arrow).to_iterable_dataset(), "hub data set 'x'", "hub:x:")
    untyped = datasets.IterableDataset.from_generator(lambda: iter(found))
    yield Stream(untyped, "hub data set 'x'", "hub:x:")


def read(table: Table, column: str | None = None) -> list[str] | str:
    """The documents, or what is wrong."""
    try:
        return list(documents(table, column))
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)


@settings(deadline=None)  # files are slow on a busy machine
@given(found=rows())
def test_every_kind_of_table_chooses_alike(
    found: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    strings = [name for name, kind in kinds_of(found).items() if kind != "other"]
    for table in tables(tmp_path_factory.mktemp("tables"), found):
        said = read(table)
        if "text" in found[0]:
            chosen = "text"
        elif len(strings) == 1:
            (chosen,) = strings
        else:
            assert f"no column 'text' and {len(strings)} other columns of strings" in said
            assert all(name in said for name in found[0])
            continue
        values = [row[chosen] for row in found if row[chosen] is not None]
        if all(isinstance(value, str) for value in values):
            assert said == values
        else:
            assert 'has no string "text"' in said


@given(found=rows(), order=st.randoms())
def test_the_order_of_the_rows_chooses_nothing(found: list[dict[str, Any]], order: Any) -> None:
    other = list(found)
    order.shuffle(other)
    assert kinds_of(found) == kinds_of(other)


IDS = [{"id": f"doc-{i}", "content": None if i == 0 else f"real text {i}"} for i in range(30)]


def test_a_first_row_of_nulls_does_not_make_the_ids_the_text(tmp_path: Path) -> None:
    for table in tables(tmp_path, IDS):
        assert "(columns: id, content): say which is the text, e.g." in read(table)
        assert read(table, "content") == [row["content"] for row in IDS[1:]]
        assert read(table, "body") == (
            f"{table.label} has no column 'body' (columns: id, content): name one that it has"
        )


def test_a_column_of_nulls_may_be_text(tmp_path: Path) -> None:
    for table in tables(tmp_path, [{"id": "doc", "content": None}]):
        assert "2 other columns of strings" in read(table)


def test_one_string_among_numbers_is_no_reason_to_read_another_column(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "a", "body": 1}\n{"id": "b", "body": "words"}')
    assert "2 other columns of strings" in read(JsonLines(file))
    assert read(JsonLines(file), "body") == (
        f'{str(file)!r} line 1 has no string "body": every row must have one, or null'
    )


def test_the_error_names_a_source_that_reads(tmp_path: Path) -> None:
    """Even where a column's name is a number, as a weight is."""
    file = tmp_path / "a.parquet"
    numbers = [{"0": f"id-{i}", "1": f"some words {i}"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(numbers), file)
    with pytest.raises(ValueError, match="say which is the text") as error:
        list(texts(str(file), split="train"))
    source = str(error.value).split("'")[-2]
    assert source == f"{file}:1:1"
    found = [text for split in ("train", "heldout") for text in texts(f"{file}:1", split=split)]
    assert sorted(found) == sorted(row["1"] for row in numbers)


def test_a_column_may_have_any_name(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    row = {"a\nb": "words to leave out", "meta:text:2": "some words to read"}
    file.write_text(json.dumps(row))
    said = read(JsonLines(file))
    assert r"(columns: 'a\nb', meta:text:2)" in said
    source = said.split("'")[-2]
    assert source == f"{file}:meta:text:2:1"
    ((name, _),) = mixture(source)
    assert "".join(texts(name, split="train")) == "some words to"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    assert "has the column 'text' twice: rename one" in read(Parquet(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "strings",
    [
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
)
def test_every_type_of_strings_is_text(tmp_path: Path, strings: pa.Array) -> None:
    pq.write_table(pa.table({"n": [1, 2], "body": strings}), tmp_path / "a.parquet")
    assert read(Parquet(tmp_path / "a.parquet")) == ["a", "b"]


def test_what_is_not_unicode_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": broken}), file)
    assert f"{str(file)!r} cannot be read: 'utf-8' codec can't decode" in read(Parquet(file))


def test_lines_end_in_every_way_and_hold_every_character(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000b"}\r\n\r\n{"text": "c\xe2\x80\xa8d"}')
    assert read(JsonLines(file)) == ["a\0b", "c\u2028d"]
    file.write_text(json.dumps({"text": "long " * 10**6}))
    assert read(JsonLines(file)) == ["long " * 10**6]
    file.write_bytes('{"text": "a"}'.encode("utf-16"))
    assert "is not readable UTF-8 text" in read(JsonLines(file))
