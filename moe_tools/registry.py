"""A name finds a thing; a wrong name gets a suggestion."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")
SHOWN = 40
"""Names in an error message, at most: a model may have hundreds of FFNs."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name nobody registered: what it is, what is close, what there is."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    there = ", ".join(names[:SHOWN]) or "none"
    return ValueError(f"unknown {kind} {name!r}{hint} (known: {there}{more})")


class Registry(Mapping[str, T]):
    """A read-only mapping whose missing key is a ValueError with a suggestion."""

    def __init__(self, kind: str, things: Mapping[str, T]) -> None:
        self.kind = kind
        self._things = dict(things)

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise unknown(self.kind, name, self._things)
        return self._things[name]

    def build(self, spec: Mapping[str, Any]) -> Any:
        """What a config entry describes, e.g. {"kind": "topk", "share": 0.5}.

        Raises:
            ValueError: no or an unknown kind, or arguments that this kind does not take.
        """
        arguments = {key: value for key, value in spec.items() if key != "kind"}
        kind: Any = self[spec.get("kind", "")]
        try:
            return kind(**arguments)
        except TypeError as error:
            raise ValueError(f"{self.kind} {spec}: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
