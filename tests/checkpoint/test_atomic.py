"""Files and folders that are complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_tools.atomic import new_file, new_folder, partial_of


def files(folder: Path) -> dict[str, str]:
    """Path below the folder -> text, hidden files included."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_folder_appears_when_its_block_is_done(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("done")
        assert not (tmp_path / "out").exists()
    assert files(tmp_path) == {"out/file": "done"}


def test_a_folder_that_failed_was_never_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"^{out} exists and is not empty"), new_folder(out):
        pass
    assert files(tmp_path) == {"out/thesis.txt": "mine"}


def test_a_new_file_appears_when_its_block_is_done(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "notes.json"  # its folder is made
    with new_file(str(target)) as partial:
        partial.write_text("done")
        assert not target.exists()
    assert files(tmp_path) == {"sub/notes.json": "done"}


def test_a_file_stays_until_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("old")
    with new_file(tmp_path / "notes") as partial:
        partial.write_text("new")
        assert (tmp_path / "notes").read_text() == "old"
    assert files(tmp_path) == {"notes": "new"}


@pytest.mark.parametrize("written", ["", "half"])
def test_a_file_that_failed_was_never_there(written: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("old")
    with pytest.raises(OSError, match="disk full"), new_file(tmp_path / "notes") as partial:
        if written:
            partial.write_text(written)
        raise OSError("disk full")
    assert files(tmp_path) == {"notes": "old"}


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    left = partial_of(tmp_path / "notes")
    left.write_text("a longer text that was cut sh")
    with new_file(tmp_path / "notes") as partial:
        assert partial == left
        with partial.open("a") as file:
            file.write("new")
    assert files(tmp_path) == {"notes": "new"}
