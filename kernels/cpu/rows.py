"""Stores an FFN for the native kernels: neuron by neuron, its rows of gate, up and W_down^T.

Letters: D model width, F neurons, P parts: gate (if any), up, down; B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_tools.kernels.cpu.native import extension
from moe_tools.kernels.few_bits import GROUP
from moe_tools.kernels.quantize import (
    INT4,
    dequantize_groups,
    quantize_groups,
    quantize_rows,
)
from moe_tools.kernels.weights import FFNWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of x and y."""
DTYPES = (*FLOATS, torch.int8, INT4)
"""The dtypes of stored weights, in the order of csrc/dtype.h."""
LINE = 64
"""Bytes of a cache line, on which every row begins."""
HUGE_PAGE = 2 << 20
"""Bytes of a huge page. They save a fifth of the time of scattered rows: fewer TLB misses."""


@dataclass(frozen=True)
class PackedRows:
    """Everything that the kernels read, in memory that belongs to this object."""

    bytes_FPB: Tensor
    """The rows, with zeros behind column D up to a full cache line; int4 as csrc/dtype.h says."""
    dtype: torch.dtype
    width: int
    scales_FP: Tensor | None
    """The scale of each int8 row, in fp32."""
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
        return -(-self.width // per_line(self.dtype))

    def stored_FD(self, part: int) -> Tensor:
        """Returns a view of the numbers of a part; of int4, which has no view, only the shape."""
        if self.dtype == INT4:
            return torch.empty(len(self.bytes_FPB), self.width, device="meta")
        return self.bytes_FPB.view(self.dtype)[:, part, : self.width]

    def matrix_FD(self, part: int, dtype: torch.dtype) -> Tensor:
        """Returns the weights of a part as `dtype`: a view if they are stored so."""
        if self.dtype == INT4:
            rows_FB = self.bytes_FPB[:, part]
            return _read_int4(rows_FB, self.lines, self.width).to(dtype)
        if self.scales_FP is None:
            return self.stored_FD(part).to(dtype)
        return (self.stored_FD(part) * self.scales_FP[:, part, None]).to(dtype)


def per_line(dtype: torch.dtype) -> int:
    """Returns how many numbers a cache line holds."""
    return LINE * 2 if dtype == INT4 else LINE // dtype.itemsize


def pack_rows(weights: FFNWeights, dtype: torch.dtype) -> PackedRows:
    """Copies the weights as `dtype`; int8 and int4 are quantized (see `kernels/quantize.py`)."""
    matrices = [rows_FD.detach() for rows_FD, _, _ in weights.inputs] + [weights.down_FD.detach()]
    shape, bias_D = (weights.neurons, len(matrices)), _float(weights.down_D)
    rows = PackedRows(
        allocate((*shape, row_bytes(weights.width, dtype))).zero_(),
        dtype,
        weights.width,
        torch.ones(shape) if dtype == torch.int8 else None,
        _biases_FP(weights),
        _float(weights.off_F),
        bias_D,
        bias_D,
    )
    for part, matrix_FD in enumerate(matrices):
        _write(rows, part, matrix_FD)
    return rows if rows.off_F is None else replace(rows, down_D=_with_off(rows, rows.off_F))


def _with_off(rows: PackedRows, off_F: Tensor) -> Tensor:
    """Returns the output where every neuron is off; one that is on adds its difference."""
    off_D = off_F @ rows.matrix_FD(rows.parts - 1, torch.float32)
    return off_D if rows.bias_D is None else off_D + rows.bias_D


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a row: whole lines of numbers and, in int4, lines of scales."""
    lines = -(-width // per_line(dtype))
    scales = lines * per_line(dtype) // GROUP * 2 if dtype == INT4 else 0
    return (lines + -(-scales // LINE)) * LINE


def _write(rows: PackedRows, part: int, matrix_FD: Tensor) -> None:
    if rows.dtype == INT4:
        _write_int4(rows.bytes_FPB[:, part], rows.lines, matrix_FD)
    elif rows.scales_FP is None:
        rows.stored_FD(part).copy_(matrix_FD)
    else:
        stored_FD, rows.scales_FP[:, part] = quantize_rows(matrix_FD)
        rows.stored_FD(part).copy_(stored_FD)


def _write_int4(rows_FB: Tensor, lines: int, matrix_FD: Tensor) -> None:
    """Packs codes: word j of a line holds its numbers j, 16 + j, ..., four bits each, plus 8."""
    codes_FD, scale_FG = quantize_groups(matrix_FD)
    columns = lines * per_line(INT4)
    codes_FD = pad(codes_FD, (0, columns - codes_FD.shape[1])).add_(8).to(torch.uint8)
    pairs = codes_FD.view(len(codes_FD), lines, 4, 2, 16)
    nibbles = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).transpose(2, 3)
    numbers = lines * LINE
    rows_FB[:, :numbers] = nibbles.flatten(1)
    scales_FB = scale_FG.contiguous().view(torch.uint8)
    rows_FB[:, numbers : numbers + scales_FB.shape[1]] = scales_FB


def _read_int4(rows_FB: Tensor, lines: int, width: int) -> Tensor:
    numbers, groups = lines * LINE, -(-width // GROUP)
    nibbles = rows_FB[:, :numbers].reshape(-1, lines, 16, 4).transpose(2, 3)
    codes_FD = torch.stack([nibbles & 15, nibbles >> 4], dim=3).flatten(1)[:, :width]
    scale_FG = rows_FB[:, numbers : numbers + 2 * groups].contiguous().view(torch.bfloat16)
    return dequantize_groups(codes_FD.to(torch.int8) - 8, scale_FG)


def _biases_FP(weights: FFNWeights) -> Tensor | None:
    biases = [_float(bias_F) for _, bias_F, _ in weights.inputs]
    if all(bias_F is None for bias_F in biases):
        return None
    zero_F = torch.zeros(weights.neurons)
    return torch.stack([zero_F if bias_F is None else bias_F for bias_F in biases], dim=1)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()


def aligned(rows: Tensor) -> Tensor:
    """Returns the rows where `allocate` would put them: a copy, unless they are there already."""
    if rows.data_ptr() % _alignment(rows.numel()) == 0:
        return rows
    return allocate(tuple(rows.shape)).copy_(rows)


def allocate(shape: tuple[int, ...]) -> Tensor:
    """Allocates bytes that begin on a cache line, and on a huge page where they are many.

    NumPy allocates: PyTorch then makes a tensor of the aligned slice alone, and a pickle or an
    exported program does not hold the bytes before it.
    """
    size = torch.Size(shape).numel()
    align = _alignment(size)
    raw = np.empty(size + align, dtype=np.uint8)
    start = -raw.ctypes.data % align
    extension().advise_huge_pages(raw.ctypes.data + start, size)  # before the first write
    return torch.from_numpy(raw[start : start + size]).view(shape)


def _alignment(size: int) -> int:
    return HUGE_PAGE if size >= HUGE_PAGE else LINE
