"""Memory for weights: on cache lines, and on huge pages where it is large."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_tools.kernels.cpu.native import extension

LINE = 64
"""Bytes of a cache line, on which every row begins."""
HUGE_PAGE = 2 << 20
"""Bytes of a huge page. They save a fifth of the time of scattered rows: fewer TLB misses."""
SLAB = 16 * HUGE_PAGE
"""Bytes that small matrices share. What none of them has touched is no memory yet."""


def allocate(shape: tuple[int, ...]) -> Tensor:
    """Allocates bytes that begin on a cache line, and lie on huge pages where those are to be had.

    Small matrices share huge pages: the layers of a small model are read one after the other, and
    with pages of 4 KB, looking up where they are takes a third of the time. The memory of such a
    page is free again when all that lie on it are.

    NumPy allocates: PyTorch then makes a tensor of the aligned slice alone, and a pickle or an
    exported program does not hold the bytes around it.
    """
    size = torch.Size(shape).numel()
    if size >= HUGE_PAGE:
        return torch.from_numpy(_on_pages(size)).view(shape)
    return torch.from_numpy(_slab.take(size)).view(shape)


class _Slab:
    """Some huge pages, of which small matrices take what they need, one behind the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """Returns so many bytes, on a cache line."""
        lines = -(-size // LINE) * LINE
        with self._lock:
            if len(self._free) < lines:
                self._free = _on_pages(SLAB)
            taken, self._free = self._free[:size], self._free[lines:]
        return taken


def _on_pages(size: int) -> NDArray[np.uint8]:
    """Bytes that nobody has touched, from the beginning of a huge page on."""
    raw = np.empty(size + HUGE_PAGE, dtype=np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    extension().advise_huge_pages(raw.ctypes.data + start, size)  # before the first write
    return raw[start : start + size]


_slab = _Slab()


def aligned(rows: Tensor) -> Tensor:
    """Returns the rows where `allocate` would put them: a copy, unless they are there already."""
    if rows.data_ptr() % _alignment(rows.numel()) == 0:
        return rows
    return allocate(tuple(rows.shape)).copy_(rows)


def _alignment(size: int) -> int:
    return HUGE_PAGE if size >= HUGE_PAGE else LINE
