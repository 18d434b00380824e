"""A stock MoE's router. Letters: T tokens, D width, R experts that are routed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_tools.experts.routers.base import in_fp32
from moe_tools.experts.routers.ridge import RidgeRouter

SPREAD = 0.02
"""Standard deviation of the started logits: weights of mode weighted lie near exp(+-spread). The
first token and a few others have logits of 10 to 30 spreads in some layers of SmolLM2, so that a
spread of 0.02 costs nothing, and 0.1 three times the perplexity (LOG.md, 2026-11-30)."""


class SoftmaxRouter(RidgeRouter):
    """softmax(W x) over the routed experts, in fp32 and without a bias (Mixtral, arXiv 2401.04088).

    In mode weighted, under top-k, it is the router of LLaMA-MoE (arXiv 2406.16554) and of Mixtral:
    a softmax of the chosen logits is the softmax of all of them, divided by what is chosen.

    Args:
        width: D.
        routed: R.
        spread: standard deviation of the logits after a start by regression.

    Raises:
        ValueError: a spread that is not above 0.
    """

    def __init__(self, width: int, routed: int, spread: float = SPREAD) -> None:
        super().__init__()
        self.set_spread(spread)
        self.weight = nn.Linear(width, routed, bias=False).weight
        self.bias = None

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, which add up to 1."""
        with in_fp32(x_TD):
            return torch.softmax(self.product_TN(x_TD), dim=-1)
