"""What mode weighted multiplies experts by. Letters: T tokens, R experts that are routed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 1e-20
"""Least sum of the chosen scores, as in GLM4-MoE and DeepSeek-V3, which add it to the sum."""


def weights_TR(scores_TR: Tensor, mask_TR: Tensor) -> Tensor:
    """K times an expert's share of the chosen scores, where K are chosen; 0 for others; in fp32.

    Equal scores weigh 1, as in mode hard. The weights of a token add up to K, or are all 0, and
    their gradients too, where its chosen scores add up to less than `LEAST`. No gradient goes
    through the mask, and none to experts that are off.

    Args:
        scores_TR: 0 or more.
        mask_TR: which experts run, whatever chose them.
    """
    chosen_TR = torch.where(mask_TR, scores_TR.float(), 0.0)
    total_T1 = chosen_TR.sum(-1, keepdim=True)
    count_T1 = mask_TR.sum(-1, keepdim=True)
    return chosen_TR * (count_T1 / torch.where(total_T1 < LEAST, math.inf, total_T1))
