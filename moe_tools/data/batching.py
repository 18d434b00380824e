"""Rows -> batches, made when they are asked for. Letters: B rows of a batch, T tokens of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_tools.data.batch import Batch
from moe_tools.data.rows import Packing, Row, Rows


class Batches(Sequence[Batch]):
    """The batches of a text, in its order; a part of them reads nothing."""

    def __init__(self, rows: Rows, packing: Packing, batch_size: int) -> None:
        """A batch has `batch_size` rows; packed `isolated`, it is one row of so many blocks."""
        self.rows, self.packing = rows, packing
        self.starts = _starts(rows, packing, batch_size)
        """First row of each batch; numbers, or what says them."""

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self._part(start, max(start, stop))  # of the same rows up to their end
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        rows = [self.rows.row(at) for at in range(self._start(index), self._start(index + 1))]
        if self.packing == "isolated":
            return isolated(rows)
        return padded(rows) if self.packing == "padded" else joined(rows)

    def _start(self, index: int) -> int:
        """First row of a batch; of the one behind the last, where the rows end."""
        return int(self.starts[index]) if index < len(self.starts) else len(self.rows)

    def _part(self, start: int, stop: int) -> Batches:
        part = object.__new__(Batches)
        part.packing, part.starts = self.packing, self.starts[start:stop]
        part.rows = self.rows.part(0, self._start(stop))
        return part

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    @property
    def tokens(self) -> int:
        """Tokens of all batches, padding left out."""
        return self._own.tokens

    @property
    def fingerprint(self) -> str:
        """Of the rows that they have."""
        return self._own.fingerprint

    @property
    def _own(self) -> Rows:
        return self.rows.part(self._start(0), len(self.rows))


Text = Tensor | Sequence[Batch]
"""blocks_BT of running text, or batches."""


def token_count(text: Text) -> int:
    """Number of tokens of a text."""
    if isinstance(text, Tensor):
        return text.numel()
    if isinstance(text, Batches):
        return text.tokens
    return sum(batch.tokens for batch in text)


def _starts(rows: Rows, packing: Packing, batch_size: int) -> range | NDArray[np.int64]:
    if packing != "isolated":
        return range(0, len(rows), batch_size)
    room, starts, taken = batch_size * rows.length, [0], 0
    for index in range(len(rows)):
        size = rows.size(index)
        if taken + size > room:
            starts.append(index)
            taken = 0
        taken += size
    return np.array(starts if len(rows) else [], dtype=np.int64)


def joined(rows: Sequence[Row]) -> Batch:
    """Rows of one length."""
    ids_BT = torch.from_numpy(np.stack([row.ids_T for row in rows]))
    if all(row.learned_T is None for row in rows):
        return Batch(ids_BT)
    return Batch(ids_BT, learned_BT=torch.from_numpy(np.stack([*map(learned, rows)])))


def padded(rows: Sequence[Row]) -> Batch:
    """Rows that are filled up to the longest with a token that counts nowhere."""
    longest = max(len(row.ids_T) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BT, learned_BT = (torch.zeros(len(rows), longest, dtype=torch.bool) for _ in range(2))
    for number, row in enumerate(rows):
        size = len(row.ids_T)
        ids_BT[number, :size] = torch.from_numpy(row.ids_T)
        learned_BT[number, :size] = torch.from_numpy(learned(row))
        mask_BT[number, :size] = True
    return Batch(ids_BT, learned_BT=learned_BT, mask_BT=mask_BT)


def isolated(rows: Sequence[Row]) -> Batch:
    """One row of all of them, whose positions begin again with each: none sees another."""
    ids_T = np.concatenate([row.ids_T for row in rows])
    positions_T = np.concatenate([np.arange(len(row.ids_T)) for row in rows])
    learned_T = np.concatenate([*map(learned, rows)]) & (positions_T > 0)
    tensors = (torch.from_numpy(array)[None] for array in (ids_T, learned_T, positions_T))
    ids_BT, learned_BT, positions_BT = tensors
    return Batch(ids_BT, learned_BT=learned_BT, positions_BT=positions_BT)


def learned(row: Row) -> NDArray[np.bool_]:
    """Which tokens of a row count in the loss."""
    return np.ones(len(row.ids_T), bool) if row.learned_T is None else row.learned_T.copy()
