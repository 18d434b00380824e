"""Pieces -> rows of tokens, which a batch is made of; what a run reads its text through.

Letters: R rows, T tokens of a row.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Packing = Literal["joined", "isolated", "padded"]
"""How pieces share a row: end to end, so that a token sees all before it; several whole ones, of
which none sees another; or one in each row of a padded batch."""
Bos = Literal["auto", "always", "never"]
"""Whether a row of running text begins with BOS: as the tokenizer begins a text, always, never."""


class Row(NamedTuple):
    """Tokens that see each other."""

    ids_T: NDArray[np.int64]
    learned_T: NDArray[np.bool_] | None = None
    """Which of them count in the loss; None: all."""


class Rows(ABC):
    """Rows in the order in which they are trained on, or a part of them; read when asked for."""

    length: int
    """Tokens of the longest row that there may be."""
    uniform: bool
    """Whether all have that length."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Row:
        """One of them.

        Raises:
            ValueError: the text ended before, or cannot be read any more.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits: equal means the same text."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """No token is larger, as far as is known before all are read."""

    def size(self, index: int) -> int:
        """Tokens of a row."""
        return self.length if self.uniform else len(self.row(index).ids_T)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self) * self.length if self.uniform else sum(map(self.size, range(len(self))))

    def covering(self, tokens: int) -> int:
        """How many of the first rows hold so many tokens, rounded down; at most all, at least 1."""
        if self.uniform:
            return max(1, min(len(self), tokens // self.length))
        taken = 0
        for count in range(len(self)):
            if taken >= tokens:
                return max(1, count)
            taken += self.size(count)
        return len(self)

    def part(self, start: int, stop: int) -> Rows:
        """Those from `start` to `stop`."""
        return self if (start, stop) == (0, len(self)) else Part(self, start, stop)

    def tensor(self, count: int | None = None) -> Tensor:
        """The first rows as blocks_BT, int64; uneven ones end to end, cut to `length`.

        Fewer tokens than a block are one short block.
        """
        count = len(self) if count is None else min(count, len(self))
        ids_T = np.concatenate([self.row(index).ids_T for index in range(count)])
        whole = len(ids_T) // self.length * self.length
        made = torch.from_numpy(ids_T)
        return made[:whole].view(-1, self.length) if whole else made[None]


@dataclass
class InMemory(Rows):
    """Rows that are all there."""

    length: int
    uniform: bool
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """One of them."""
        return self.rows[index]

    @property
    def fingerprint(self) -> str:
        """Of running text that of the tensor of it."""
        plain = self.uniform and all(row.learned_T is None for row in self.rows)
        found = hashlib.sha256()
        if plain:
            found.update(str((len(self), self.length)).encode())
        for row in self.rows:
            if not plain:
                found.update(f"{len(row.ids_T)} {row.learned_T is None}".encode())
            found.update(row.ids_T.astype("<i8").tobytes())
            if row.learned_T is not None:
                found.update(row.learned_T.tobytes())
        return found.hexdigest()[:16]

    @property
    def largest(self) -> int:
        """Of all tokens."""
        return max(int(row.ids_T.max()) for row in self.rows)


def of_blocks(blocks_BT: Tensor) -> InMemory:
    """Blocks of running text as rows."""
    rows = [Row(ids_T) for ids_T in blocks_BT.to(torch.int64).numpy()]
    return InMemory(blocks_BT.shape[1], True, rows)


@dataclass
class Part(Rows):
    """Rows of others, from `start` to `stop`."""

    whole: Rows
    start: int
    stop: int

    def __post_init__(self) -> None:
        self.length, self.uniform = self.whole.length, self.whole.uniform

    def __len__(self) -> int:
        return self.stop - self.start

    def row(self, index: int) -> Row:
        """One of them."""
        return self.whole.row(self.start + index)

    def size(self, index: int) -> int:
        """Tokens of a row."""
        return self.whole.size(self.start + index)

    @property
    def fingerprint(self) -> str:
        """Of a part in memory that of its tokens, else of the whole and its place there."""
        if isinstance(self.whole, InMemory):
            rows = self.whole.rows[self.start : self.stop]
            return InMemory(self.length, self.uniform, rows).fingerprint
        return named(self.whole.fingerprint, self.start, self.stop)

    @property
    def largest(self) -> int:
        """Of the whole."""
        return self.whole.largest


@dataclass
class Epochs(Rows):
    """A text again and again: first in its own order, then in another each time."""

    once: Rows
    count: float
    seed: int
    orders: dict[int, NDArray[np.uint32]] = field(default_factory=dict)
    """Of the epoch that is read now."""

    def __post_init__(self) -> None:
        self.length, self.uniform = self.once.length, self.once.uniform

    def __len__(self) -> int:
        return max(1, round(self.count * len(self.once)))

    def row(self, index: int) -> Row:
        """One of them."""
        return self.once.row(self._place(index))

    def size(self, index: int) -> int:
        """Tokens of a row."""
        return self.once.size(self._place(index))

    def _place(self, index: int) -> int:
        epoch, place = divmod(index, len(self.once))
        if epoch == 0:
            return place
        if epoch not in self.orders:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            order = random.permutation(len(self.once)).astype(np.uint32)
            self.orders = {epoch: order}
        return int(self.orders[epoch][place])

    @property
    def fingerprint(self) -> str:
        """Of the text and how often it is read."""
        return named(self.once.fingerprint, self.seed, float(self.count))

    @property
    def largest(self) -> int:
        """Of the text."""
        return self.once.largest


class Mixed(Rows):
    """Rows of several sources in turn: after every row, each has its share, to one row.

    The text ends with the first source that is used up, so that the shares hold throughout.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], wanted: int | None):
        """`wanted` tokens at most, of all together; None: as many as there are."""
        self.sources, self.length = sources, max(rows.length for rows in sources)
        self.uniform = all(rows.uniform for rows in sources)
        self.shares = [weight / sum(weights) for weight in weights]
        self.used_up: int | None = None
        """The source that ended first."""
        self.turns, self.places = self._take_turns(wanted)

    def _take_turns(self, wanted: int | None) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The source of each row, and its place there."""
        turns, places = bytearray(), array("I")
        taken, tokens, done = [0] * len(self.sources), [0] * len(self.sources), 0
        while wanted is None or done < wanted:
            # in rows of full length, so that shares of whole rows are exact
            whole = done // self.length + 1 if self.uniform else done / self.length + 1
            owed = [
                share * whole - (own // self.length if self.uniform else own / self.length)
                for share, own in zip(self.shares, tokens, strict=True)
            ]
            source = owed.index(max(owed))
            if taken[source] == len(self.sources[source]):
                self.used_up = source
                break
            size = self.sources[source].size(taken[source])
            turns.append(source)
            places.append(taken[source])
            taken[source] += 1
            tokens[source] += size
            done += size
        return np.frombuffer(bytes(turns), np.uint8), np.array(places)

    def __len__(self) -> int:
        return len(self.turns)

    def row(self, index: int) -> Row:
        """One of them."""
        return self.sources[self.turns[index]].row(int(self.places[index]))

    def size(self, index: int) -> int:
        """Tokens of a row."""
        return self.sources[self.turns[index]].size(int(self.places[index]))

    @property
    def fingerprint(self) -> str:
        """Of what is in memory that of its tokens, else of the sources and their shares."""
        if all(isinstance(rows, InMemory) for rows in self.sources):
            rows = [self.row(index) for index in range(len(self))]
            return InMemory(self.length, self.uniform, rows).fingerprint
        return named(*(rows.fingerprint for rows in self.sources), *self.shares, len(self))

    @property
    def largest(self) -> int:
        """Of all sources."""
        return max(rows.largest for rows in self.sources)


def named(*parts: object) -> str:
    """16 hex digits that stand for some values together."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
