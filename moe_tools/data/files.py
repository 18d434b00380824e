"""Documents in the user's files: .txt and .md are one document each, .jsonl and .parquet many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_tools.data.compressed import open_text, suffix
from moe_tools.data.folders import text_files
from moe_tools.data.holdout import boundary
from moe_tools.data.tables import TABLES, Form, documents, form_of, open_table, utf8

SUFFIXES = (".txt", ".md", *TABLES)
LARGE = 2**26
"""Characters from which a .txt or .md file is several documents: memory has limits."""
PIECE = 2**24
"""Characters of such a document."""


def read_path(path: Path, column: str | None = None) -> Iterator[str]:
    """The documents of a file, or of a folder's files by sorted path; blank ones are left out.

    Args:
        path: a file or a folder (`text_files` says what is read of it).
        column: the text in tables.

    Raises:
        ValueError: a file is of another kind, malformed or empty, or a folder has none.
    """
    files = files_of(path)
    if column is not None and not any(suffix(file) in TABLES for file in files):
        raise ValueError(
            f"{str(path)!r} has no columns, so none is {column!r}: only {' and '.join(TABLES)} "
            "files have some"
        )
    found = False
    for file in files:
        for text in map(str.strip, _read_file(file, column)):
            if text:
                found = True
                yield text
    if not found:
        raise ValueError(f"{str(path)!r} has no text: use a file with some, or 'docs'")


def form_of_path(path: Path, column: str | None = None) -> Form:
    """What the documents of a file are, or those of all files of a folder.

    Raises:
        ValueError: as `read_path`, or one file has text and another conversations.
    """
    forms = {file: _form_of_file(file, column) for file in files_of(path)}
    first = next(iter(forms))
    for file, form in forms.items():
        if form != forms[first]:
            raise ValueError(
                f"{str(first)!r} has {NAMES[forms[first]]}, but {str(file)!r} has {NAMES[form]}: "
                "give them as two sources"
            )
    return forms[first]


NAMES: dict[Form, str] = {
    "text": "text",
    "turns": "conversations",
    "pair": "prompts and completions",
}


def files_of(path: Path) -> list[Path]:
    """The file, or those of the folder, by sorted path.

    Raises:
        ValueError: a folder has none.
    """
    if not path.is_dir():
        return [path]
    files = text_files(path, SUFFIXES)
    if not files:
        raise ValueError(f"folder {str(path)!r} has no {_kinds()} file: use a folder with text")
    return files


def _form_of_file(path: Path, column: str | None) -> Form:
    if suffix(path) not in TABLES:
        return "text"
    table = open_table(path)
    kinds = table.kinds()
    return form_of(table, kinds, column)[0] if kinds else "text"


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    """The documents of one file, by its kind."""
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is not a {_kinds()} file: convert it to one of them")
    if kind in TABLES:
        return documents(open_table(path), column)
    return _pieces(path)


def _pieces(path: Path) -> Iterator[str]:
    """A file as one document; from `LARGE` characters on, pieces cut between paragraphs."""
    with utf8(path), open_text(path) as file:
        text = file.read(LARGE)
        rest = file.read(PIECE) if len(text) == LARGE else ""
        if not rest:
            yield text
            return
        text += rest
        while text:
            if len(text) < 2 * PIECE:
                text += file.read(PIECE)
            end = boundary(text, PIECE // 2, PIECE) if len(text) > PIECE else len(text)
            yield text[:end]
            text = text[end:]


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
