"""Documents in the user's files: .txt and .md are one document each, .jsonl and .parquet many."""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_tools.data.hub import parquet_texts

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def read_path(path: Path) -> list[str]:
    """All documents of a file, or of a folder's files by sorted path; blank ones are left out.

    Raises:
        ValueError: a file is of another kind, malformed or empty, or a folder has none.
    """
    files = _inside(path) if path.is_dir() else [path]
    documents = [text for file in files for text in map(str.strip, _read_file(file)) if text]
    if not documents:
        raise ValueError(f"{str(path)!r} has no text: use a file with some, or 'docs'")
    return documents


def _inside(folder: Path) -> list[Path]:
    """The readable files below a folder, sorted; names with a leading dot are skipped."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"folder {str(folder)!r} has no {_kinds()} file: use a folder with text")
    return files


def _read_file(path: Path) -> Iterator[str]:
    """The documents of one file, by its kind."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is not a {_kinds()} file: convert it to one of them")
    if kind == ".parquet":
        return parquet_texts(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not readable UTF-8 text: {error}") from error
    return _json_lines(path, text) if kind == ".jsonl" else iter([text])


def _json_lines(path: Path, text: str) -> Iterator[str]:
    """The field "text" of every line that is not blank."""
    # Not splitlines(): JSON strings may hold U+2028 and other line ends of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_text(line, f"{str(path)!r} line {number}")


def _json_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): one object a line is needed") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no string "text": every line must be {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{where} has half of a surrogate pair in "text": repair it') from error
    return text


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
