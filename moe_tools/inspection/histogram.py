"""Counts a stream of values in a histogram without knowing their range beforehand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 128
FINEST = 2.0**-7


class Histogram:
    """Counts in at most `BINS` bins of one width, a power of two; 0 is always an edge.

    What falls outside doubles the width: two neighbours become one, so that counts stay exact.
    """

    def __init__(self) -> None:
        self.width = FINEST
        self.first = 0
        """Index of the lowest bin; bin 0 begins at 0."""
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Counts finite values of any shape."""
        if not values.numel():
            return
        low, high = (float(value) for value in values.aminmax())
        while self._bins(low, high) > BINS:
            self._coarsen()
        bins = (values.flatten() / self.width).floor().long()
        first = min(math.floor(low / self.width), self.first if len(self.counts) else math.inf)
        found = torch.bincount(bins - int(first)).cpu()
        self._merge(int(first), found)

    @property
    def edges(self) -> list[float]:
        """Edges of the bins: one more than there are counts."""
        return [(self.first + index) * self.width for index in range(len(self.counts) + 1)]

    def _bins(self, low: float, high: float) -> int:
        """The number of bins that these values and the earlier ones need."""
        first, last = math.floor(low / self.width), math.floor(high / self.width)
        if len(self.counts):
            first, last = min(first, self.first), max(last, self.first + len(self.counts) - 1)
        return last - first + 1

    def _coarsen(self) -> None:
        self.width *= 2
        if not len(self.counts):
            return
        bins = torch.arange(self.first, self.first + len(self.counts)) // 2
        self.first = int(bins[0])
        self.counts = torch.zeros(int(bins[-1]) - self.first + 1, dtype=torch.int64).index_add(
            0, bins - self.first, self.counts
        )

    def _merge(self, first: int, found: Tensor) -> None:
        if not len(self.counts):
            self.first, self.counts = first, found
            return
        size = max(first + len(found), self.first + len(self.counts)) - first
        counts = torch.zeros(size, dtype=torch.int64)
        counts[: len(found)] += found
        start = self.first - first
        counts[start : start + len(self.counts)] += self.counts
        self.first, self.counts = first, counts
