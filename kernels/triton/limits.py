"""Where the kernels are faster than matrix products on a card, and with which tiles.

What was measured on a card (`make gpu`) is a table of `Entry`, in `tuned.json` beside this file for
cards that we had at hand. A card that nobody measured gets `UNTUNED`, which errs towards matrix
products. The share is that of the *union*: the neurons that any token of one tile wants.

Letters: D model width, F neurons, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moe_tools.kernels.triton.config import MOST_TOGETHER, Config

Kind = Literal["given", "gate first"]
"""Which neurons run is given (a mask, a router), or their gates are computed first."""
Dtype = Literal["fp32", "bf16", "fp16", "int8", "int4"]

UNTUNED: dict[int, float] = {1: 0.6, 4: 0.4, 16: 0.25, MOST_TOGETHER: 0.1}
"""Tokens -> the share, on a card that nobody measured: a guess. At one token the bytes that are
saved have to pay for launches and gaps; matrix units make more tokens nearly free when dense."""
FILE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured of one FFN on one card.

    Raises:
        ValueError: an unknown dtype or kind, or sizes and shares that cannot be.
    """

    device: str
    """As torch.cuda.get_device_name has it."""
    dtype: Dtype
    """Of the weights."""
    kind: Kind
    width: int
    neurons: int
    tokens: int
    share: float
    """Of the neurons in the union; up to it the kernels are as fast as products; 0: never."""
    tiles: tuple[int, ...]
    """The numbers of the fastest `Config`."""

    def __post_init__(self) -> None:
        known = self.dtype in get_args(Dtype) and self.kind in get_args(Kind)
        if not known or min(self.width, self.neurons, self.tokens) < 1 or not 0 <= self.share <= 1:
            raise ValueError(f"{self} is no entry of a table of limits")
        Config.from_numbers(self.tiles)

    @property
    def config(self) -> Config | None:
        """The fastest tiles; None: the pinned ones."""
        return Config.from_numbers(self.tiles)

    @property
    def subject(self) -> tuple[str, Dtype, Kind]:
        """What a table speaks for as a whole: a card, a dtype and a kind."""
        return self.device, self.dtype, self.kind

    def distance(self, width: int, neurons: int) -> float:
        """How far another shape is from the one that was measured."""
        return abs(math.log(width / self.width)) + abs(math.log(neurons / self.neurons))


@dataclass(frozen=True)
class Limits:
    """The entries of one FFN, of rising numbers of tokens; without any, those of `UNTUNED`."""

    entries: tuple[Entry, ...] = ()

    def share(self, tokens: int) -> float:
        """Up to which share of the union the kernels pay, for as many tokens."""
        entry = self._of(tokens)
        if entry is not None:
            return entry.share
        above = [share for measured, share in UNTUNED.items() if measured >= tokens]
        return above[0] if above else UNTUNED[MOST_TOGETHER]

    def config(self, tokens: int) -> Config | None:
        """The fastest tiles that are known for as many tokens; None: the pinned ones."""
        entry = self._of(tokens)
        return None if entry is None else entry.config

    def pays(self, tokens: int, share: float) -> bool:
        """Whether the kernels are expected to be faster.

        Args:
            tokens: of the call.
            share: of the neurons that one token wants. Tokens are taken to choose on their own, so
                that the union is the largest that is likely, and to be as many as were measured.
        """
        together = next((most for most in self._counts() if most >= tokens), MOST_TOGETHER)
        return union(share, together) <= self.share(tokens)

    def _counts(self) -> list[int]:
        """The numbers of tokens that were measured: for those between them the next one speaks."""
        return [entry.tokens for entry in self.entries] or list(UNTUNED)

    def _of(self, tokens: int) -> Entry | None:
        """That of the next larger number of tokens that was measured, or of the largest."""
        above = [entry for entry in self.entries if entry.tokens >= tokens]
        return above[0] if above else self.entries[-1] if self.entries else None


def union(share: float, tokens: int) -> float:
    """Share of the neurons that some of several tokens want, if each chooses on its own."""
    return 1 - (1 - share) ** tokens


def of(device: str, dtype: Dtype, kind: Kind, width: int, neurons: int) -> Limits:
    """The limits of an FFN: those of the nearest shape that was measured on this card."""
    known = [one for one in in_force if one.subject == (device, dtype, kind)]
    if not known:
        return Limits()
    nearest = min(known, key=lambda one: one.distance(width, neurons))
    shape = (nearest.width, nearest.neurons)
    found = [one for one in known if (one.width, one.neurons) == shape]
    return Limits(tuple(sorted(found, key=lambda one: one.tokens)))


def put_in_force(entries: Iterable[Entry]) -> None:
    """Lets these speak for their cards, dtypes and kinds, in place of what was known of them."""
    in_force[:] = merged(in_force, entries)


def merged(known: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """Both tables as one: the new one alone speaks for its cards, dtypes and kinds."""
    new = list(new)
    replaced = {one.subject for one in new}
    return [one for one in known if one.subject not in replaced] + new


def read(path: Path) -> list[Entry]:
    """Reads a table.

    Raises:
        OSError: there is none.
        ValueError: it is not what `written` makes.
    """
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError("it is no list")
        return [Entry(**{**one, "tiles": tuple(one["tiles"])}) for one in found]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no table of limits: {error}") from error


def written(entries: Iterable[Entry]) -> str:
    """A table as a file has it, an entry a line."""
    lines = (json.dumps(asdict(entry)) for entry in entries)
    return "[\n" + ",\n".join(lines) + "\n]\n"


in_force: list[Entry] = read(FILE) if FILE.exists() else []
"""What is known of the cards here."""
