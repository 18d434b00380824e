"""Wraps attributes of other libraries' classes with functions of ours, and unwraps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_ABSENT = object()


class Seam:
    """An attribute of another library's class, which we wrap with a function."""

    def __init__(self, owner: type, name: str, around: Callable[[Any], Any]) -> None:
        self.owner, self.name = owner, name
        self.around = around
        """Makes our function from what is there: as the class holds it, or inherits it, or None."""
        self._is_on = False
        self._made: list[tuple[Any, Any]] = []
        """Every function that we made, and what the class itself held before."""

    def put(self, *, on_top: bool = False) -> None:
        """Installs our function; a second call changes nothing.

        Args:
            on_top: also wrap what another library has put in its place since.
        """
        if self._is_on and not on_top:
            return
        self._is_on = True
        if self._on_top() is None:
            before = vars(self.owner).get(self.name, _ABSENT)
            found = getattr(self.owner, self.name, None) if before is _ABSENT else before
            ours = self.around(found)
            self._made.append((ours, before))
            setattr(self.owner, self.name, ours)

    def take(self) -> None:
        """Removes our function, unless another library has wrapped it since: then it stays."""
        self._is_on = False
        while (found := self._on_top()) is not None:
            _, before = found
            if before is _ABSENT:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, before)

    def _on_top(self) -> tuple[Any, Any] | None:
        now = vars(self.owner).get(self.name)
        return next((pair for pair in self._made if pair[0] is now), None)


class Once:
    """Tells which of nested calls on one object is the outermost, within one thread."""

    def __init__(self) -> None:
        self._busy: ContextVar[frozenset[int]] = ContextVar("busy", default=frozenset())

    @contextmanager
    def outermost(self, thing: object) -> Iterator[bool]:
        """Yields True unless a call on this object is already running."""
        busy = self._busy.get()
        token = self._busy.set(busy | {id(thing)})
        try:
            yield id(thing) not in busy
        finally:
            self._busy.reset(token)


def function_of(held: Any) -> Any:
    """The function behind a class attribute, e.g. behind a staticmethod or a partialmethod."""
    if isinstance(held, classmethod):
        return held.__func__
    bind = getattr(held, "__get__", None)
    return held if bind is None else bind(None, object)
