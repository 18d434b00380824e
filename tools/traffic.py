"""Counts which bytes the kernels read, load by load, under Triton's interpreter.

    with count_loads() as loads:
        sparse_ffn(..., backend="triton")
    loads.bytes_of(up_FD)       # of this tensor, every load counted
    loads.rows_of(up_FD)        # which of its rows

A load that its mask switches off reads nothing and is not counted. Letters: F neurons, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


@dataclass
class Loads:
    """The address and size of every element that was read, in order."""

    seen: list[tuple[np.ndarray, int]] = field(default_factory=list)
    """(addresses, bytes of each element) of one load."""

    def addresses(self, tensor: Tensor) -> np.ndarray:
        """Finds the byte offsets into `tensor` that were read, each as often as it was."""
        size = tensor.element_size()
        start = tensor.data_ptr()
        stop = start + size * (1 + sum((n - 1) * s for n, s in _extents(tensor)))
        found = [at[(at >= start) & (at < stop)] for at, width in self.seen if width == size]
        return np.concatenate([np.empty(0, np.uint64), *found]) - np.uint64(start)

    def bytes_of(self, tensor: Tensor) -> int:
        """Counts the bytes of `tensor` that were read; twice if read twice."""
        return len(self.addresses(tensor)) * tensor.element_size()

    def rows_of(self, weight_FD: Tensor) -> list[int]:
        """Lists the rows of which anything was read, in ascending order."""
        row = weight_FD.stride(0) * weight_FD.element_size()
        return [int(index) for index in np.unique(self.addresses(weight_FD) // row)]


@contextmanager
def count_loads() -> Iterator[Loads]:
    """Counts the loads of all kernels that the interpreter runs inside the block."""
    loads, builder = Loads(), interpreter.interpreter_builder
    read = builder.create_masked_load

    def record(ptrs: Any, mask: Any, *rest: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        loads.seen.append((ptrs.data[mask.data].astype(np.uint64), size))
        return read(ptrs, mask, *rest)

    builder.create_masked_load = record
    try:
        yield loads
    finally:
        del builder.create_masked_load  # the class's own shows again


def _extents(tensor: Tensor) -> Iterator[tuple[int, int]]:
    return zip(tensor.shape, tensor.stride(), strict=True)
