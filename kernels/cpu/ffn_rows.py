"""Stores an FFN for the native kernels: neuron by neuron, its rows of gate, up and W_down^T.

Letters: D model width, F neurons, P parts: gate (if any), up, down; B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_tools.kernels.cpu.memory import allocate
from moe_tools.kernels.cpu.rows import (
    BITS,
    Order,
    line_count,
    read_rows,
    row_bytes,
    rows_as,
    write_rows,
)
from moe_tools.kernels.weights import FFNWeights


@dataclass(frozen=True)
class PackedRows:
    """Everything that the kernels read, in memory that belongs to this object."""

    bytes_FPB: Tensor
    """The rows, as `rows.py` says."""
    dtype: torch.dtype
    width: int
    biases_FP: Tensor | None
    """The biases of gate and up, in fp32."""
    off_F: Tensor | None
    """What is subtracted from h of a neuron that is on, in fp32."""
    bias_D: Tensor | None
    """The bias of the output, in fp32."""
    down_D: Tensor | None
    """The output where every neuron is off, in fp32."""

    @property
    def parts(self) -> int:
        """The rows of a neuron: 3 with a gate, 2 without."""
        return self.bytes_FPB.shape[1]

    @property
    def lines(self) -> int:
        """The cache lines that hold the numbers of a row."""
        return line_count(self.width, self.dtype)

    def of(self, neurons: slice) -> PackedRows:
        """Returns some neurons, without what belongs to the output."""
        biases_FP, off_F = (
            None if one is None else one[neurons] for one in (self.biases_FP, self.off_F)
        )
        return replace(
            self,
            bytes_FPB=self.bytes_FPB[neurons],
            biases_FP=biases_FP,
            off_F=off_F,
            bias_D=None,
            down_D=None,
        )

    def stored_FD(self, part: int) -> Tensor:
        """Returns a view of the numbers of a part; where there is none, only the shape."""
        if self.dtype in BITS:
            return torch.empty(len(self.bytes_FPB), self.width, device="meta")
        return read_rows(self.bytes_FPB[:, part], self.width, self.dtype)

    def matrix_FD(self, part: int, dtype: torch.dtype) -> Tensor:
        """Returns the weights of a part as `dtype`: a view if they are stored so."""
        return rows_as(self.bytes_FPB[:, part], self.width, self.dtype, dtype, self._order(part))

    def write(self, part: int, matrix_FD: Tensor) -> None:
        """Stores the weights of a part."""
        write_rows(self.bytes_FPB[:, part], matrix_FD, self.dtype, self._order(part))

    def _order(self, part: int) -> Order:
        return "added" if part == self.parts - 1 else "multiplied"


def pack_rows(weights: FFNWeights, dtype: torch.dtype) -> PackedRows:
    """Copies the weights as `dtype`; int8 and int4 are rounded to their grid."""
    matrices = [rows_FD.detach() for rows_FD, _, _ in weights.inputs] + [weights.down_FD.detach()]
    shape, bias_D = (weights.neurons, len(matrices)), _float(weights.down_D)
    rows = PackedRows(
        allocate((*shape, row_bytes(weights.width, dtype))).zero_(),
        dtype,
        weights.width,
        _biases_FP(weights),
        _float(weights.off_F),
        bias_D,
        bias_D,
    )
    for part, matrix_FD in enumerate(matrices):
        rows.write(part, matrix_FD)
    return rows if rows.off_F is None else replace(rows, down_D=_with_off(rows, rows.off_F))


def _with_off(rows: PackedRows, off_F: Tensor) -> Tensor:
    """Returns the output where every neuron is off; one that is on adds its difference."""
    off_D = off_F @ rows.matrix_FD(rows.parts - 1, torch.float32)
    return off_D if rows.bias_D is None else off_D + rows.bias_D


def _biases_FP(weights: FFNWeights) -> Tensor | None:
    biases = [_float(bias_F) for _, bias_F, _ in weights.inputs]
    if all(bias_F is None for bias_F in biases):
        return None
    zero_F = torch.zeros(weights.neurons)
    return torch.stack([zero_F if bias_F is None else bias_F for bias_F in biases], dim=1)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
