"""Calls a function each time a certain module has been imported or reloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Lock, local
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder):
    """An import hook for one module; it finds the module as the other finders do.

    It stays until `stop`, whoever only looks for the module and however often an import fails, and
    calls `then` once the module is executed. Python asks the finders in order, so it moves to the
    front while it waits; a module that another finder loaded all the same is noticed at the next
    import of anything. `then` may therefore see a module twice, or one that is half executed.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.then = then
        self._moving = Lock()
        self._asking = local()

    def start(self) -> None:
        """Begins to wait, in the place of a hook that this package left before it was reloaded.

        A second call changes nothing.
        """
        finders: list[Any] = list(sys.meta_path)
        for finder in finders:
            if _is_former(finder) and finder.name == self.name:
                finder.stop()
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Ends the waiting; modules that were loaded in the meantime stay as they are."""
        while self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the awaited module, its loader wrapped; returns None for any other name."""
        if name != self.name:
            self._look_around()
            return None
        if getattr(self._asking, "others", False):  # one of the others asks all but itself
            return None
        self._asking.others = True
        try:
            spec = self._spec_of_others(path, target)
        finally:
            self._asking.others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThen(spec.loader, self.then)
        return spec

    def _spec_of_others(
        self, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in [each for each in sys.meta_path if each is not self]:
            find = getattr(finder, "find_spec", None)  # a finder of before Python 3.4 has none
            spec = None if find is None else find(self.name, path, target)
            if spec is not None:
                return spec
        return None

    def _look_around(self) -> None:
        module = sys.modules.get(self.name)
        if module is not None:
            self.then(module)
        elif sys.meta_path[0] is not self:
            self._to_the_front()

    def _to_the_front(self) -> None:
        """Never leaves the list in between: another thread may be importing the module."""
        with self._moving:
            places = [place for place, each in enumerate(sys.meta_path) if each is self]
            if places and places[0] > 0:  # stopped, but asked by somebody who remembers it
                sys.meta_path.insert(0, self)
                del sys.meta_path[places[0] + 1]


def _is_former(finder: Any) -> bool:
    """Whether the class of a finder is `AfterImport` as it was imported before."""
    kind = type(finder)
    names = (kind.__module__, kind.__qualname__)
    return kind is not AfterImport and names == (__name__, AfterImport.__qualname__)


class _LoaderThen(Loader):
    """Wraps the loader that was found: calls `then` once it has executed the module."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        """Source, data and resources are the loader's own."""
        return getattr(self._loader, name)
