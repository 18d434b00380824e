"""A folder of text: what stands in it and is none is left out, and its absence is said."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from moe_tools.data import texts


def read(folder: Path | str) -> str:
    return " ".join(
        text for split in ("train", "heldout") for text in texts(str(folder), split=split)
    )


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "book.txt", "a book of some words that may be cut somewhere")
    return tmp_path / "data"


MARKS = {
    "recipe.yaml": "# text: 0123\n# weights: 4567\n# donor: d\n# dtype: torch.float32\nname: x\n",
    "config.json": '{"model_type": "gpt2"}',
    "tokenizer.json": "{}",
    "adapter_model.safetensors": "",
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_folder_of_a_model_or_a_run_is_no_text(folder: Path, mark: str) -> None:
    before = read(folder)
    for deep in ("out", "out/control", "out/steps/0-split"):
        write(folder / deep / "README.md", "a model card")
        write(folder / deep / "vocab.txt", "a vocabulary")
    assert "card" in read(folder)
    write(folder / "out" / mark, MARKS[mark])
    assert read(folder) == before
    with pytest.raises(ValueError, match=rf"out' holds a model or a run \({mark}\), and no text"):
        read(folder / "out")
    assert "card" in read(folder / "out" / "README.md")


def test_files_of_the_same_names_in_other_programs_are_no_marks(folder: Path) -> None:
    for mark, content in {"recipe.yaml": "name: soup\nflour: 3\n", "config.json": "{}"}.items():
        write(folder / "kitchen" / mark, content)
    write(folder / "kitchen" / "soup.md", "how to cook a soup")
    assert "soup" in read(folder)


def test_figures_of_a_grid_are_no_text(folder: Path) -> None:
    before = read(folder)
    write(folder / "grid.jsonl", json.dumps({"grid": {"model": "x"}}) + "\n")
    assert read(folder) == before
    write(folder / "puzzle.jsonl", json.dumps({"grid": [[1]], "text": "a puzzle"}) + "\n")
    assert read(folder) != before


def test_what_is_not_read_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = read(folder)
    assert not caplog.records
    for name in ("a.tar.gz", "b.csv.zst", "c.csv", "LICENSE", "d.gz", ".hidden.gz", ".git/x.gz"):
        write(folder / name, "x")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "self.txt").symlink_to("self.txt")
    with caplog.at_level(logging.WARNING):
        assert read(folder) == before
    assert caplog.messages[0] == (
        f"{folder}: not read: 1 .csv files, 2 .gz files, 1 .zst files, 1 broken links or special "
        "files, 1 files without a suffix, 1 links to folders"
    )


def test_a_link_to_a_file_is_read(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "blob", "the words of another file")
    (folder / "linked.md").symlink_to(tmp_path / "blob")
    assert "another file" in read(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed_is_an_error(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match="closed' cannot be listed: Permission denied"):
        read(folder)


def test_tables_and_texts_stand_side_by_side(folder: Path) -> None:
    rows = [{"id": str(i), "body": f"document {i}"} for i in range(30)]
    write(folder / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    found = read(f"{folder}:body")
    assert "book" in found and "document 29" in found
    with pytest.raises(ValueError, match=r"rows\.jsonl' has no column 'text' and 2 other"):
        read(folder)
    with pytest.raises(ValueError, match=r"book\.txt' has no columns, so none is 'body'"):
        read(f"{folder / 'book.txt'}:body")
