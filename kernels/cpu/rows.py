"""How the native kernels store an FFN: neuron by neuron, its rows of gate, up and W_down^T.

Letters: D model width, F neurons, P parts: gate (if any), up, down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_tools.kernels.cpu.native import extension
from moe_tools.kernels.quantize import quantize_rows
from moe_tools.kernels.weights import FFNWeights

LINE = 64
"""Bytes of a cache line, on which every row begins."""
HUGE_PAGE = 2 << 20
"""Bytes. Fewer pages, fewer misses of the address cache: a fifth of the time of scattered rows."""


@dataclass(frozen=True)
class Rows:
    """Everything the kernels read, in memory that it owns."""

    rows_FPD: Tensor
    """Zeros behind column D, up to a full cache line."""
    scales_FP: Tensor | None
    """fp32; what a row of int8 is multiplied with."""
    biases_FP: Tensor | None
    """fp32; of gate and up."""
    down_D: Tensor | None
    """fp32."""


def pack_rows(weights: FFNWeights, dtype: torch.dtype) -> Rows:
    """Copies the weights, as `dtype`: int8 quantizes each row (see `quantize_rows`)."""
    matrices = [rows_FD.detach() for rows_FD, _, _ in weights.inputs] + [weights.down_FD.detach()]
    width = weights.width
    line = LINE // dtype.itemsize
    padded = -(-width // line) * line
    rows_FPD = _allocate((weights.neurons, len(matrices), padded), dtype)
    rows_FPD[..., width:] = 0
    scales_FP = torch.ones(weights.neurons, len(matrices)) if dtype == torch.int8 else None
    for part, matrix_FD in enumerate(matrices):
        if scales_FP is None:
            rows_FPD[:, part, :width] = matrix_FD
        else:
            rows_FPD[:, part, :width], scales_FP[:, part] = quantize_rows(matrix_FD)
    return Rows(rows_FPD, scales_FP, _biases_FP(weights), _float(weights.down_D))


def _biases_FP(weights: FFNWeights) -> Tensor | None:
    biases = [_float(bias_F) for _, bias_F, _ in weights.inputs]
    if all(bias_F is None for bias_F in biases):
        return None
    zero_F = torch.zeros(weights.neurons)
    return torch.stack([zero_F if bias_F is None else bias_F for bias_F in biases], dim=1)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    align = HUGE_PAGE if size >= HUGE_PAGE else LINE
    raw = torch.empty(size + align, dtype=torch.uint8)
    start = -raw.data_ptr() % align
    extension().advise_huge_pages(raw.data_ptr() + start, size)  # before the first write
    return raw[start : start + size].view(dtype).view(shape)
