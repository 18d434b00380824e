"""Quantizes weights: int8 with one scale a row, int4 with one scale for each 32 of a row.

Letters: D columns, F rows, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.kernels.few_bits import groups
from moe_tools.kernels.weights import FFNWeights

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # the stubs lack it
QUANTIZED = (torch.int8, INT4)


def quantize_rows(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (int8 rows, fp32 scale_F): row * scale is nearest to the weight, at most 127."""
    weight_FD = weight_FD.float()
    scale_F = weight_FD.abs().amax(dim=1) / 127
    scale_F = torch.where(scale_F > 0, scale_F, 1.0)
    return (weight_FD / scale_F[:, None]).round().to(torch.int8), scale_F


def quantize_groups(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (codes_FD in int8, bf16 scale_FG): code * scale is nearest to the weight.

    Codes go from -7 to 7; the largest entry of a group is at 7, but for the rounding of the scale
    (one in 256).
    """
    groups_FGN = groups(weight_FD.float())
    scale_FG = (groups_FGN.abs().amax(dim=2) / 7).bfloat16()
    scale_FG = torch.where(scale_FG > 0, scale_FG, 1.0)
    codes_FGN = (groups_FGN / scale_FG[..., None].float()).round().clamp(-7, 7).to(torch.int8)
    return codes_FGN.flatten(1)[:, : weight_FD.shape[1]], scale_FG


def dequantize_groups(codes_FD: Tensor, scale_FG: Tensor) -> Tensor:
    """Returns weight_FD in fp32."""
    weight_FGN = groups(codes_FD.float()) * scale_FG[..., None].float()
    return weight_FGN.flatten(1)[:, : codes_FD.shape[1]]


def rounded(weights: FFNWeights, dtype: torch.dtype) -> FFNWeights:
    """Rounds weights to what `dtype` can hold; int8 and int4 leave them in the dtype they have."""
    kept = weights.up_FD.dtype if dtype in QUANTIZED else dtype

    def matrix(weight_FD: Tensor) -> Tensor:
        if dtype == torch.int8:
            rows_FD, scale_F = quantize_rows(weight_FD)
            return (rows_FD * scale_F[:, None]).to(kept)
        if dtype == INT4:
            return dequantize_groups(*quantize_groups(weight_FD)).to(kept)
        return weight_FD.to(dtype)

    return weights.changed(matrix, lambda bias_F: bias_F.to(kept))
