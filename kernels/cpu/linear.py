"""`CpuLinear`: y = x W^T + b on the native kernels, at the speed at which the rows are read.

Letters: T tokens (any leading dimensions), D columns, N rows, B bytes of a row.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.kernels.cpu.memory import LINE, aligned, allocate
from moe_tools.kernels.cpu.native import address, extension, isa_index
from moe_tools.kernels.cpu.rows import (
    BITS,
    DTYPES,
    FLOATS,
    NAMES,
    as_floats,
    check_x,
    line_count,
    read_rows,
    row_bytes,
    write_codes,
    write_rows,
)
from moe_tools.kernels.few_bits import FewBits
from moe_tools.kernels.quantize import INT4

FEW = 32
"""Tokens for which the kernels read rows of floats; PyTorch's matrix product is faster for more.
Rows of int8 and int4, which it would have to widen, they multiply with any number."""


def own_rows(weight_ND: Tensor) -> bool:
    """Whether the kernels read a weight in its own dtype, so that it can be a view of the rows."""
    whole = weight_ND.shape[1] * weight_ND.element_size() % LINE == 0
    return weight_ND.device.type == "cpu" and weight_ND.dtype in FLOATS and whole


class CpuLinear:
    """A linear that is packed once and called often; it does not follow changes of the weights.

    Weights in the dtype of x are multiplied exactly, with sums in fp32. With int8 and int4 (a
    scale for each 32 of a row) x is rounded to int8 in such groups, too (`few_bits.group_int8`).
    A deep copy is the linear itself.

    Args:
        weight_ND: of any floating dtype, on the CPU; copied.
        bias_N: added; None: 0.
        dtype: in which the rows are stored: fp32, bf16, fp16, int8 or int4.
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
        rows, width = weight_ND.shape
        rows_NB = allocate((rows, row_bytes(width, dtype))).zero_()
        write_rows(rows_NB, weight_ND.detach(), dtype)
        self._hold(rows_NB, as_floats(bias_N), width, dtype, 0.0, isa)

    def _hold(self, *stored: Any) -> None:
        """Prepares the kernel; `stored` is what a pickle keeps."""
        rows_NB, bias_N, width, dtype, offset, isa = self._stored = stored
        self.offset: float = offset
        self.rows_NB: Tensor = rows_NB
        self.bias_N: Tensor | None = bias_N
        self.width: int = width
        self.dtype: torch.dtype = dtype
        self._native = extension()
        self.handle = self._native.prepare_linear(
            rows_NB=rows_NB.data_ptr(),
            bias_N=address(bias_N),
            rows=len(rows_NB),
            width=width,
            lines=line_count(width, dtype),
            dtype=DTYPES.index(dtype),
            zero=8 - offset,
            isa=isa_index(isa),
        )

    @classmethod
    def of_codes(
        cls, few: FewBits, bias_N: Tensor | None = None, *, isa: str | None = None
    ) -> CpuLinear:
        """Packs a copy of at most four bits, which `few_bits.copy_rows` made, in int4."""
        made = cls.__new__(cls)
        rows, width = few.codes_FD.shape
        rows_NB = allocate((rows, row_bytes(width, INT4))).zero_()
        write_codes(rows_NB, few, INT4)
        made._hold(rows_NB, as_floats(bias_N), width, INT4, few.offset, isa)
        return made

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
        check_x(x_TD, self.width, "linear")
        if torch.compiler.is_compiling():
            made: Tensor = linear_cpu(x_TD, *self.operands)
            return made
        tokens = x_TD.numel() // self.width
        if tokens > FEW and self.dtype not in BITS:
            bias_N = None if self.bias_N is None else self.bias_N.to(x_TD.dtype)
            return linear(x_TD, self.weight_ND().to(x_TD.dtype), bias_N)
        x_TD = x_TD.contiguous()  # stays alive until the kernel is done
        y_TN = torch.empty((*x_TD.shape[:-1], len(self.rows_NB)), dtype=x_TD.dtype)
        self._native.multiply(
            self.handle,
            threads=torch.get_num_threads(),
            x_TD=x_TD.data_ptr(),
            dtype=DTYPES.index(x_TD.dtype),
            tokens=tokens,
            y_TN=y_TN.data_ptr(),
        )
        return y_TN

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the operator `linear_cpu` takes besides x."""
        rows_NB, bias_N, width, dtype, offset, isa = self._stored
        return rows_NB, bias_N, width, str(dtype), offset, isa

    def weight_ND(self, rows: slice = slice(None)) -> Tensor:
        """Returns some rows in fp32, or a view where they are stored as floats."""
        return read_rows(self.rows_NB[rows], self.width, self.dtype, offset=self.offset)


def _unpickled(rows_NB: Tensor, *others: Any) -> CpuLinear:
    """Restores the linear, on the kernels of this CPU, with rows that begin on lines and pages."""
    made = CpuLinear.__new__(CpuLinear)
    made._hold(aligned(rows_NB), *others)
    return made


@torch.library.custom_op("moe_tools::linear_cpu", mutates_args=())
def linear_cpu(
    x_TD: Tensor,
    rows_NB: Tensor,
    bias_N: Tensor | None,
    width: int,
    dtype: str,
    offset: float,
    isa: str | None,
) -> Tensor:
    """Computes y_TN; the operands are those of `CpuLinear`. Eager calls go past it."""
    stored = DTYPES[NAMES.index(dtype)]
    made = CpuLinear.__new__(CpuLinear)
    made._hold(rows_NB, bias_N, width, stored, offset, isa)
    return made(x_TD)


@linear_cpu.register_fake
def _(x_TD: Tensor, rows_NB: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty((*x_TD.shape[:-1], len(rows_NB)))
