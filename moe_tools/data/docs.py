"""The embedded corpus "docs": English prose in the docstrings of pinned wheels.

What is installed here does not matter, nor which Python reads: the same wheels give the same bytes,
and `TEXT` says which. A change of the table of wheels or of the rules below shows there, so the
text cannot move unseen. That digest also names the cached file and proves it whole.

The files are read with `ast` and never imported. Whole files are held out (5 %, by a hash of their
path), and training text loses every paragraph that shares a long line with them: documentation
repeats itself a lot. Reading takes about 20 s, so the result is kept in the user's cache folder.
"""

import ast
import gc
import hashlib
import json
import logging
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

from moe_tools.cached import cache_file, write_cache
from moe_tools.data.holdout import TextSplit, is_held_out, normalise
from moe_tools.data.progress import progress
from moe_tools.data.wheels import python_files

logger = logging.getLogger(__name__)

TEXT: dict[TextSplit, str] = {
    "heldout": "e390bf9b4afe34bf4af1a062da9c33f646f3f238f8aa14e630c0bf18a2e4922f",
    "train": "3e2ec5a1859ee40177f054e8ccc6ed37f36c6f1eee9903cc884dd2ab94740262",
}
"""Split -> the SHA-256 of its file in the cache: a JSON string a line, sorted by path in the wheel
and by position in the file."""

MIN_DOCUMENT = 300
"""Characters; shorter docstrings are phrases and type notes, not prose."""

MIN_PARAGRAPH = 80
"""Normalised characters from which a paragraph may occur only once; headings are shorter."""

MIN_LINE = 60
"""Normalised characters from which a line of held-out text bars a paragraph from training: the
parameter lists of transformers repeat single entries, 12 % of the held-out text without this."""

_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NESTED = ("body", "handlers", "orelse", "finalbody", "cases")

File = tuple[str, bytes]
"""(path in its wheel, content) of a source file."""


def docs(split: TextSplit) -> list[str]:
    """The documents of one split, from the cache or, the first time, from the wheels.

    Raises:
        ValueError: a wheel cannot be had, or gives another text than the pinned one.
    """
    cached = _read_cache(split)
    if cached is not None:
        return cached
    corpus = extract(python_files())
    for part, documents in corpus.items():
        body = _body(documents)
        _check(part, body)
        _write_cache(part, body)
    return corpus[split]


def extract(files: Iterable[File]) -> dict[TextSplit, list[str]]:
    """Read, divide and de-duplicate: held-out files first, so that train never repeats them.

    Raises:
        ValueError: this Python cannot read a file. Leaving it out would be another text.
    """
    by_side: dict[bool, list[File]] = {True: [], False: []}
    for file in files:
        by_side[is_held_out(file[0])].append(file)
    seen: set[bytes] = set()
    with progress("reading docstrings", sum(map(len, by_side.values())), "file") as bar:
        first, rest = ([*_read(by_side[side], bar.update)] for side in (True, False))
    barred = {line for document in first for line in _long_lines(document)}
    return {
        "heldout": list(_first_seen(first, seen)),
        "train": list(_first_seen(rest, seen, barred)),
    }


def _read(files: Iterable[File], advance: Callable[[], object]) -> Iterator[str]:
    """All documents of some files."""
    enabled = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles: looking for some takes a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            for name, source in files:
                yield from _documents(name, source)
                advance()
    finally:
        if enabled:
            gc.enable()


def _documents(name: str, source: bytes) -> Iterator[str]:
    """The cleaned long docstrings of one file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"source 'docs': Python {platform.python_version()} cannot read {name} of its pinned "
            f"wheel ({error}): use another Python, or a text file as data"
        ) from error
    for text in map(_clean, _docstrings(tree)):
        if len(text) >= MIN_DOCUMENT:
            yield text


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings in the order of the file; expressions are not entered, as they hold none."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _DEFINITIONS):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield text
        for field in reversed(_NESTED):
            stack += reversed(getattr(node, field, ()))


def _clean(docstring: str) -> str:
    """Takes the indentation off. `inspect.cleandoc` does it in other ways since Python 3.13."""
    first, *lines = docstring.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in lines if line.strip()), default=0)
    text = "\n".join([first, *(line[margin:].rstrip() for line in lines)]).strip()
    # A lone surrogate is legal in a literal, but not in UTF-8 and not for a tokenizer.
    return text.encode(errors="replace").decode()


def _first_seen(
    documents: Iterable[str], seen: set[bytes], barred: AbstractSet[str] = frozenset()
) -> Iterator[str]:
    """Documents without long paragraphs seen before or with barred lines, if enough is left."""
    for document in documents:
        text = "\n\n".join(
            paragraph
            for paragraph in re.split(r"\n\s*\n", document)
            if barred.isdisjoint(_long_lines(paragraph))
            and (len(normalise(paragraph)) < MIN_PARAGRAPH or _is_new(paragraph, seen))
        ).strip()
        # Marked, since a document of one paragraph was seen as a paragraph just now.
        if len(text) >= MIN_DOCUMENT and _is_new(f"document: {text}", seen):
            yield text


def _long_lines(text: str) -> Iterator[str]:
    """The normalised lines that are too long to be the same by chance."""
    return (line for line in map(normalise, text.split("\n")) if len(line) >= MIN_LINE)


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Whether this text was not seen yet; from now on it was."""
    key = hashlib.sha1(normalise(text).encode()).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def _check(split: TextSplit, body: str) -> None:
    """Refuses a text that moved."""
    if _sha256(body) != TEXT[split]:
        raise ValueError(
            f"source 'docs' ({split}) has the SHA-256 {_sha256(body)} under Python "
            f"{platform.python_version()} and not {TEXT[split]}: figures would not compare. Please "
            "report it, and use a text file as data"
        )


def _cache_file(split: TextSplit) -> Path:
    return cache_file(f"docs-{TEXT[split][:16]}-{split}.jsonl")


def _read_cache(split: TextSplit) -> list[str] | None:
    """What `_write_cache` wrote; None if it is absent, cut short or something else."""
    try:
        body = _cache_file(split).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return (
        [json.loads(line) for line in body.splitlines()] if _sha256(body) == TEXT[split] else None
    )


def _write_cache(split: TextSplit, body: str) -> None:
    try:
        write_cache(_cache_file(split), body)
    except OSError as error:
        logger.warning("cannot cache the docs corpus, the next run reads it again: %s", error)


def _body(documents: list[str]) -> str:
    return "\n".join(map(json.dumps, documents))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
