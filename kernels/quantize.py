"""Weights in eight bits, one scale a row. Letters: D columns, F rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.kernels.weights import FFNWeights


def quantize_rows(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 rows, fp32 scale_F): row * scale is nearest to the weight, the largest entry at 127."""
    weight_FD = weight_FD.float()
    scale_F = weight_FD.abs().amax(dim=1) / 127
    scale_F = torch.where(scale_F > 0, scale_F, 1.0)
    return (weight_FD / scale_F[:, None]).round().to(torch.int8), scale_F


def rounded(weights: FFNWeights, dtype: torch.dtype) -> FFNWeights:
    """The weights as a store of `dtype` holds them; int8 is handed back in the dtype it came in."""
    kept = weights.up_FD.dtype if dtype == torch.int8 else dtype

    def matrix(weight_FD: Tensor) -> Tensor:
        if dtype != torch.int8:
            return weight_FD.to(dtype)
        rows_FD, scale_F = quantize_rows(weight_FD)
        return (rows_FD * scale_F[:, None]).to(kept)

    return weights.changed(matrix, lambda bias_F: bias_F.to(kept))
