"""The embedded corpus "docs": English prose in the docstrings of installed packages.

The files are read with `ast` and never imported. Whole files are held out (5 %, by a hash of their
path), and training text loses every paragraph that shares a long line with them: documentation
repeats itself a lot. Reading takes about 20 s, so the result is kept in the user's cache folder.
"""

import ast
import gc
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from importlib import metadata, util
from pathlib import Path

from moe_tools.data.holdout import TextSplit, is_held_out, normalise
from moe_tools.data.progress import progress

logger = logging.getLogger(__name__)

PACKAGES = {
    "numpy": "numpy",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "torch": "torch",
    "transformers": "transformers",
}
"""Distribution -> the folder it installs."""

TOPICS = "pydoc_data/topics.py"
"""The language reference of the standard library: a dictionary of texts, not docstrings."""

MIN_DOCUMENT = 300
"""Characters; shorter docstrings are phrases and type notes, not prose."""

MIN_PARAGRAPH = 80
"""Normalised characters from which a paragraph may occur only once; headings are shorter."""

MIN_LINE = 60
"""Normalised characters from which a line of held-out text bars a paragraph from training: the
parameter lists of transformers repeat single entries, 12 % of the held-out text without this."""

RULES = 2
"""Raise when the code below selects other text: older caches are then ignored."""

_TEST_FOLDERS = {"test", "tests", "testing", "_testing"}
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NESTED = ("body", "handlers", "orelse", "finalbody", "cases")


def docs(split: TextSplit) -> list[str]:
    """The documents of one split, sorted by package, path and position in the file.

    Raises:
        ValueError: one of the packages is not installed.
    """
    path = _cache_folder() / f"docs-{_key()}-{split}.jsonl"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    corpus = _scan()
    for part, documents in corpus.items():
        _write_cache(path.with_name(f"docs-{_key()}-{part}.jsonl"), documents)
    return corpus[split]


def _key() -> str:
    """Names everything that the text depends on."""
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        raise ValueError(
            f"source 'docs' reads the docstrings of installed packages, and there is no "
            f"{', '.join(missing)}: pip install {' '.join(missing)}, or use a text file as data"
        )
    facts = {**versions, "python": platform.python_version(), "rules": RULES}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _version(name: str) -> str | None:
    """The installed version, None if there is none (or its files are not to be found)."""
    try:
        return metadata.version(name) if _root(PACKAGES[name]) else None
    except metadata.PackageNotFoundError:
        return None


def _root(module: str) -> Path | None:
    """The folder of a package, found without importing it."""
    spec = util.find_spec(module)
    return Path(spec.origin).parent if spec and spec.origin else None


def _files() -> Iterator[tuple[str, Path]]:
    """Every source file that is no test, as (package/path, place), sorted."""
    for module in sorted({*PACKAGES.values(), Path(TOPICS).parts[0]}):
        root = _root(module)
        if root is None:  # a Python without pydoc_data; PACKAGES have been checked
            continue
        for path in sorted(root.rglob("*.py")):
            inner = path.relative_to(root)
            if not _TEST_FOLDERS & set(inner.parts) and not inner.name.startswith("test_"):
                yield f"{module}/{inner.as_posix()}", path


def _scan() -> dict[TextSplit, list[str]]:
    """Read, divide and de-duplicate: held-out files first, so that train never repeats them."""
    files = list(_files())
    held_out = [file for file in files if is_held_out(file[0])]
    train = [file for file in files if not is_held_out(file[0])]
    seen: set[bytes] = set()
    with progress("reading docstrings", len(files), "file") as bar:
        first = _read(held_out, bar.update)
        rest = _read(train, bar.update)
    barred = {line for document in first for line in _long_lines(document)}
    return {
        "heldout": list(_first_seen(first, seen)),
        "train": list(_first_seen(rest, seen, barred)),
    }


def _read(files: Iterable[tuple[str, Path]], advance: Callable[[], object]) -> list[str]:
    """All documents of some files."""
    found: list[str] = []
    enabled = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles: looking for some takes a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            for name, path in files:
                found += _documents(name, path.read_bytes())
                advance()
    finally:
        if enabled:
            gc.enable()
    return found


def _documents(name: str, source: bytes) -> list[str]:
    """The cleaned long texts of one file; none if its syntax is newer than this Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = _topics(tree) if name == TOPICS else _docstrings(tree)
    # A lone surrogate is legal in a literal, but not in UTF-8 and not for a tokenizer.
    cleaned = (inspect.cleandoc(text).encode(errors="replace").decode() for text in found)
    return [text for text in cleaned if len(text) >= MIN_DOCUMENT]


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


def _topics(tree: ast.Module) -> Iterator[str]:
    """The values of the dictionaries that a file assigns."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


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


def _cache_folder() -> Path:
    """`$XDG_CACHE_HOME/moe_tools`; its standard says to ignore a relative path."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "moe_tools"


def _read_cache(path: Path) -> list[str] | None:
    """What `_write_cache` wrote; None if it is absent, cut short or something else."""
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if head != _checksum(body):
        return None
    return [json.loads(line) for line in body.splitlines()]


def _write_cache(path: Path, documents: list[str]) -> None:
    """One JSON string a line below a line with their checksum; complete or not there at all."""
    body = "\n".join(map(json.dumps, documents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(f"{_checksum(body)}\n{body}")
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot cache the docs corpus, the next run reads it again: %s", error)


def _checksum(body: str) -> str:
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
