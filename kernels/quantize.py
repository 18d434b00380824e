"""Rounds weights to what the kernels store them as.

Letters: D columns, F rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.kernels.few_bits import store_rows
from moe_tools.kernels.weights import FFNWeights

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # the stubs lack it
QUANTIZED = (torch.int8, INT4)


def quantize_rows(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (int8 rows, fp32 scale_F): row * scale is nearest to the weight, at most 127."""
    weight_FD = weight_FD.float()
    scale_F = weight_FD.abs().amax(dim=1) / 127
    scale_F = torch.where(scale_F > 0, scale_F, 1.0)
    return (weight_FD / scale_F[:, None]).round().to(torch.int8), scale_F


def rounded(weights: FFNWeights, dtype: torch.dtype) -> FFNWeights:
    """Rounds weights to what `dtype` can hold; int8 and int4 leave them in the dtype they have.

    These two have a scale for each 32 of a row (`few_bits.store_rows`).
    """
    kept = weights.up_FD.dtype if dtype in QUANTIZED else dtype

    def matrix(weight_FD: Tensor) -> Tensor:
        if dtype in QUANTIZED:
            return store_rows(weight_FD, 8 if dtype == torch.int8 else 4).values_FD(kept)
        return weight_FD.to(dtype)

    return weights.changed(matrix, lambda bias_F: bias_F.to(kept))
