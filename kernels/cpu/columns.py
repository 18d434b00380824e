"""`CpuColumns`: y = x W^T + b from the columns of W, for x that is zero in many places.

A column that meets nothing but zeros is not read: what drops the small numbers of x saves the bytes
of what they would have met (TEAL, arXiv 2408.14690, section 4.3).

Letters: T tokens (any leading dimensions), D columns, N rows, B bytes of a column.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from moe_tools.kernels.cpu.memory import aligned, allocate
from moe_tools.kernels.cpu.native import address, extension, isa_index
from moe_tools.kernels.cpu.rows import (
    BITS,
    DTYPES,
    as_floats,
    check_x,
    line_count,
    row_bytes,
    rows_as,
    write_rows,
)

FEW = 8
"""Tokens for which columns are added one by one; of more, nearly every column is wanted by one."""


class CpuColumns:
    """A linear that is packed once and called often; it does not follow changes of the weights.

    Sums are in fp32; the result depends neither on the number of threads nor on their timing. What
    meets a zero of x counts as zero, also where it is infinite. A deep copy is the linear itself.

    Args:
        weight_ND: of any floating dtype, on the CPU; copied.
        bias_N: added; None: 0.
        dtype: in which the columns are stored: fp32, bf16, fp16, int8 or int4 (a scale for each 32
            of a column).
        isa: one of `isas()`; by default the fastest that this CPU runs.
    """

    def __init__(
        self,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        dtype: torch.dtype,
        *,
        isa: str | None = None,
    ) -> None:
        rows, columns = weight_ND.shape
        columns_DB = allocate((columns, row_bytes(rows, dtype))).zero_()
        write_rows(columns_DB, weight_ND.detach().T, dtype, "added")
        self._hold(columns_DB, as_floats(bias_N), rows, dtype, isa)

    def _hold(self, *stored: Any) -> None:
        """Prepares the kernel; `stored` is what a pickle keeps."""
        self.columns_DB, self.bias_N, self.rows, self.dtype, isa = self._stored = stored
        self._native = extension()
        self._handle = self._native.prepare_columns(
            columns_DB=self.columns_DB.data_ptr(),
            bias_N=address(self.bias_N),
            columns=len(self.columns_DB),
            rows=self.rows,
            lines=line_count(self.rows, self.dtype),
            dtype=DTYPES.index(self.dtype),
            isa=isa_index(isa),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns the linear itself: it never changes, and its numbers are most of a model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what is stored."""
        return _unpickled, self._stored

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Computes y_TN, in the dtype of x.

        Raises:
            ValueError: another width, dtype or device.
        """
        check_x(x_TD, len(self.columns_DB), "linear")
        tokens = x_TD.numel() // len(self.columns_DB)
        if tokens > FEW or torch.compiler.is_compiling():
            y_TN = x_TD @ self.weight_ND(x_TD.dtype).T
            return y_TN if self.bias_N is None else y_TN + self.bias_N.to(x_TD.dtype)
        x_TD = x_TD.contiguous()  # stays alive until the kernel is done
        y_TN = torch.empty((*x_TD.shape[:-1], self.rows), dtype=x_TD.dtype)
        self._native.multiply_columns(
            self._handle,
            threads=torch.get_num_threads(),
            x_TD=x_TD.data_ptr(),
            dtype=DTYPES.index(x_TD.dtype),
            tokens=tokens,
            y_TN=y_TN.data_ptr(),
        )
        return y_TN

    def weight_ND(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns W: a view where it is stored as `dtype`, by default as it is stored."""
        if dtype is None:
            dtype = torch.float32 if self.dtype in BITS else self.dtype
        return rows_as(self.columns_DB, self.rows, self.dtype, dtype, "added").T


def _unpickled(columns_DB: Tensor, *others: Any) -> CpuColumns:
    """Restores the linear, on the kernels of this CPU, with columns that begin on cache lines."""
    made = CpuColumns.__new__(CpuColumns)
    made._hold(aligned(columns_DB), *others)
    return made
