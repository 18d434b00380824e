"""Documents in the user's files: .txt and .md are one document each, .jsonl and .parquet many."""

from collections.abc import Iterator
from pathlib import Path

from moe_tools.data.folders import text_files
from moe_tools.data.tables import TABLES, documents, open_table, utf8

SUFFIXES = (".txt", ".md", *TABLES)


def read_path(path: Path, column: str | None = None) -> list[str]:
    """All documents of a file, or of a folder's files by sorted path; blank ones are left out.

    Args:
        path: a file or a folder (`text_files` says what is read of it).
        column: the text in tables.

    Raises:
        ValueError: a file is of another kind, malformed or empty, or a folder has none.
    """
    files = _inside(path) if path.is_dir() else [path]
    if column is not None and not any(file.suffix.lower() in TABLES for file in files):
        raise ValueError(
            f"{str(path)!r} has no columns, so none is {column!r}: only {' and '.join(TABLES)} "
            "files have some"
        )
    read = (text.strip() for file in files for text in _read_file(file, column))
    found = [text for text in read if text]
    if not found:
        raise ValueError(f"{str(path)!r} has no text: use a file with some, or 'docs'")
    return found


def _inside(folder: Path) -> list[Path]:
    files = text_files(folder, SUFFIXES)
    if not files:
        raise ValueError(f"folder {str(folder)!r} has no {_kinds()} file: use a folder with text")
    return files


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    """The documents of one file, by its kind."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is not a {_kinds()} file: convert it to one of them")
    if kind in TABLES:
        return documents(open_table(path), column)
    with utf8(path):
        return iter([path.read_text(encoding="utf-8-sig")])


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
