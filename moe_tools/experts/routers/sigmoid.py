"""LTE's router. Letters: T tokens, D width, R experts that are routed."""

from __future__ import annotations

import torch
from torch import nn

from moe_tools.experts.routers.base import LabelRouter, ProductFP32
from moe_tools.experts.routers.ridge import RidgeRouter

SPREAD = 2.0
"""Standard deviation of the started logits: most scores clear of tau, none saturated."""


class SigmoidRouter(LabelRouter, RidgeRouter):
    """G = sigmoid(W x + b), one independent score an expert (LTE, arXiv 2402.06126).

    The bias is ours: with it training starts from "every expert on" (G near 1).

    Args:
        width: D.
        routed: R.
        bias: whether there is a b. GLM4-MoE's weights have none; without it a fresh router scores
            every expert 0.5, and half of the scores are below 0.5 after a start by regression: for
            top-k.
        spread: standard deviation of the logits after a start by regression. In mode weighted a
            small one keeps weights near 1.

    Raises:
        ValueError: a spread that is not above 0.
    """

    def __init__(self, width: int, routed: int, bias: bool = True, spread: float = SPREAD) -> None:
        super().__init__()
        self.set_spread(spread)
        self.weight = nn.Parameter(torch.zeros(routed, width))
        self.bias = nn.Parameter(torch.full((routed,), 3.0)) if bias else None

    @property
    def last(self) -> ProductFP32:
        """The router itself."""
        return self
