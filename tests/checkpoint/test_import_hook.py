"""A call after the import of one module: whoever looks for it, however often it fails."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_tools.checkpoint.import_hook import AfterImport

NAME = "awaited_module"
OTHER = "other_module"


class Waiting:
    """An import hook for a module in a folder of its own, and what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[list[str]] = []
        self.hook = AfterImport(NAME, self.then)

    def then(self, module: ModuleType) -> None:
        self.seen.append([name for name in ("first", "last") if hasattr(module, name)])

    def write(self, body: str = "", name: str = NAME) -> None:
        (self.folder / f"{name}.py").write_text(f"first = 1\n{body}\nlast = 1\n")
        importlib.invalidate_caches()


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    monkeypatch.syspath_prepend(str(tmp_path))
    others = [finder for finder in sys.meta_path if not isinstance(finder, AfterImport)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a reload within a second reads it
    made = Waiting(tmp_path)
    made.write()
    made.write(name=OTHER)
    made.hook.start()
    yield made
    for name in (NAME, OTHER):
        sys.modules.pop(name, None)


def test_it_is_called_once_the_module_is_executed(waiting: Waiting) -> None:
    importlib.import_module(OTHER)
    assert waiting.seen == []
    importlib.import_module(NAME)
    assert waiting.seen == [["first", "last"]]
    importlib.import_module(NAME)
    assert len(waiting.seen) == 1


def test_looking_for_the_module_changes_nothing(waiting: Waiting) -> None:
    before = list(sys.meta_path)
    for _ in range(2):
        spec = importlib.util.find_spec(NAME)
        assert spec is not None and spec.origin == str(waiting.folder / f"{NAME}.py")
    assert sys.meta_path == before and waiting.seen == []
    importlib.import_module(NAME)
    assert waiting.seen == [["first", "last"]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError, SyntaxError])
def test_a_failed_import_leaves_it_waiting(waiting: Waiting, error: type[BaseException]) -> None:
    waiting.write(f"raise {error.__name__}")
    with pytest.raises(error):
        importlib.import_module(NAME)
    assert waiting.seen == []
    waiting.write()
    importlib.import_module(NAME)
    assert waiting.seen == [["first", "last"]]


def test_a_missing_module_is_missing_as_ever(waiting: Waiting) -> None:
    (waiting.folder / f"{NAME}.py").unlink()
    importlib.invalidate_caches()
    assert importlib.util.find_spec(NAME) is None
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{NAME}'"):
        importlib.import_module(NAME)


def test_a_reload_calls_it_again(waiting: Waiting) -> None:
    module = importlib.import_module(NAME)
    del module.last
    importlib.reload(module)
    assert waiting.seen == [["first", "last"]] * 2


def test_of_many_threads_one_imports(waiting: Waiting) -> None:
    waiting.write("import time; time.sleep(0.05)")
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        importlib.util.find_spec(NAME)
        importlib.import_module(NAME)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting.seen == [["first", "last"]]


class First(MetaPathFinder):
    """Another library's finder, which claims the module."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return PathFinder.find_spec(name, path) if name == NAME else None


class Delegating(MetaPathFinder):
    """Another library's finder, which claims everything and asks all others."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        return next((spec for spec in found if spec is not None), None)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("finder", [First(), Delegating()])
def test_a_finder_that_came_later_and_stands_first(
    waiting: Waiting, finder: MetaPathFinder, place: int
) -> None:
    sys.meta_path.insert(place, finder)
    waiting.write(f"import {OTHER}")
    importlib.import_module(OTHER)
    importlib.import_module(NAME)
    assert waiting.seen == [["first", "last"]]


def test_what_another_finder_has_loaded_is_noticed_at_the_next_import(waiting: Waiting) -> None:
    sys.meta_path.insert(0, First())
    importlib.import_module(NAME)
    assert waiting.seen == []  # nobody has asked it
    importlib.import_module(OTHER)
    assert waiting.seen == [["first", "last"]]


def test_after_the_end_nothing_is_called(waiting: Waiting) -> None:
    waiting.hook.start()  # a second time
    waiting.hook.stop()
    assert waiting.hook not in sys.meta_path
    importlib.import_module(NAME)
    waiting.hook.stop()
    assert waiting.seen == []


def test_the_loader_is_the_one_that_was_found(waiting: Waiting) -> None:
    module = importlib.import_module(NAME)
    assert module.__spec__ is not None
    loader: Any = module.__spec__.loader
    assert loader.get_source(NAME) == (waiting.folder / f"{NAME}.py").read_text()
    assert importlib.import_module("inspect").getsource(module).startswith("first = 1")
