"""Finds things by their names; a wrong name gets a suggestion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, TypeVar

T = TypeVar("T")
SHOWN = 40
"""Largest number of names in an error message: a model may have hundreds of FFNs."""
LONGEST = 100
"""Characters of a wrong name that an error repeats."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name nobody registered: what it is, what is close, what there is."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    there = ", ".join(names[:SHOWN]) or "none"
    return ValueError(f"unknown {kind} {short(name, LONGEST)}{hint} (known: {there}{more})")


def short(value: Any, longest: int = 30) -> str:
    """A value as an error shows it: a few words of so many letters, however much it is made of."""
    shown = Repr()
    shown.maxlevel, shown.maxstring = 2, longest
    return shown.repr(value)


ANYTHING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
"""Kinds of parameters that name no argument: `nn.Module.__init__` has them and refuses all."""


def check_arguments(
    call: Callable[..., Any], arguments: Mapping[str, Any], what: str, *, given: int = 0
) -> None:
    """Checks that a callable names these arguments in its signature, without calling it.

    Its own TypeErrors are then its own, and not taken for a user's mistake.

    Args:
        call: a class or a function.
        arguments: what a user wrote.
        what: the thing they are for, as the error calls it.
        given: how many arguments it gets before them, by position.

    Raises:
        ValueError: an unknown or a missing argument.
    """
    found = inspect.signature(call)
    named = [each for each in found.parameters.values() if each.kind not in ANYTHING]
    try:
        found.replace(parameters=named).bind(*[None] * given, **arguments)
    except TypeError as error:
        names = ", ".join(each.name for each in named[given:]) or "no arguments"
        raise ValueError(f"{what}: {error} (it takes {names})") from error


class Registry(Mapping[str, T]):
    """A table of what there is of a kind; a missing name is a ValueError with a suggestion."""

    def __init__(self, kind: str, things: Mapping[str, T]) -> None:
        self.kind = kind
        self._things = dict(things)

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str) or name not in self._things:
            raise unknown(self.kind, str(name), self._things)
        return self._things[name]

    def add(self, name: str, thing: T) -> None:
        """Adds a thing; a package of yours does it when it is imported.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._things:
            raise ValueError(f"there is a {self.kind} {name!r} already: choose another name")
        self._things[name] = thing

    def build(self, spec: Mapping[str, Any]) -> Any:
        """Makes what a config entry describes, e.g. {"kind": "topk", "share": 0.5}.

        Raises:
            ValueError: no or an unknown kind, or arguments that this kind does not take.
        """
        arguments = {key: value for key, value in spec.items() if key != "kind"}
        kind: Any = self[spec.get("kind", "")]
        check_arguments(kind, arguments, f"{self.kind} {dict(spec)}")
        return kind(**arguments)

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
