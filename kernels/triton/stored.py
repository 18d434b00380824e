"""Weight rows as the kernels read them: floats, or codes in eight and four bits with scales.

Two codes of four bits share a byte of uint8, the first in its low half, each plus 8. A row starts
at a multiple of 16 bytes, which a thread reads at once. The scales are bf16, one for each 32
columns.

Letters: D columns, F rows, G groups of 32 columns, P bytes of a padded row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_tools.kernels.few_bits import GROUP, FewBits, store_rows
from moe_tools.kernels.quantize import INT4

ALIGNED = 16
"""Bytes that a thread loads at once."""


class Rows(NamedTuple):
    """The rows of one matrix."""

    stored: Tensor
    """(F, D) floats, (F, P) int8, or (F, P) uint8 of two codes."""
    scale_FG: Tensor | None = None
    """None: floats."""
    offset: float = 0.0
    """What is added to a code before it is multiplied by its scale."""

    def values_FD(self, width: int, dtype: torch.dtype) -> Tensor:
        """The numbers that they stand for; of floats the rows themselves."""
        if self.scale_FG is None:
            return self.stored.to(dtype)
        codes_FP = self.stored
        if codes_FP.dtype == torch.uint8:
            halves = torch.stack([codes_FP & 15, codes_FP >> 4], dim=-1)
            codes_FP = halves.flatten(1).to(torch.int8) - 8
        few = FewBits(codes_FP[:, :width], self.scale_FG, 8, self.offset)
        return few.values_FD(dtype)


def store(weight_FD: Tensor, dtype: torch.dtype) -> Rows:
    """Copies a matrix; int8 and int4 round it, unless it lies on such a grid (`store_rows`)."""
    weight_FD = weight_FD.detach()
    if dtype == INT4:
        return of_codes(store_rows(weight_FD, 4), halves=True)
    if dtype == torch.int8:
        return of_codes(store_rows(weight_FD, 8), halves=False)
    copied = weight_FD.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return Rows(copied)


def of_codes(few: FewBits, *, halves: bool | None = None) -> Rows:
    """Lays codes out.

    Args:
        few: rows in few bits.
        halves: two codes a byte; by default where they have four bits or fewer.
    """
    codes_FD = few.codes_FD
    if few.bits <= 4 if halves is None else halves:
        first_FP, second_FP = (
            pad(codes_FD + 8, (0, codes_FD.shape[1] % 2), value=8)
            .to(torch.uint8)
            .unflatten(1, (-1, 2))
            .unbind(-1)
        )
        stored = _aligned(first_FP | (second_FP << 4), filler=0x88)
    else:
        stored = _aligned(codes_FD, filler=0)
    return Rows(stored, few.scale_FG.contiguous(), few.offset)


def _aligned(rows_FP: Tensor, filler: int) -> Tensor:
    """Pads each row to a multiple of 16 bytes."""
    return pad(rows_FP, (0, -rows_FP.shape[1] % ALIGNED), value=filler).contiguous()


assert GROUP == 32  # as rows.py has it
