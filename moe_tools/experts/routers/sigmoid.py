"""LTE's router. Letters: T tokens, D model width, F neurons, R experts that are routed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import in_fp32, matrix_flops
from moe_tools.experts.routers.labels import LabelRouter
from moe_tools.hosts.ffn import FFN


class SigmoidRouter(LabelRouter):
    """G = sigmoid(W x + b), one independent score an expert (LTE, arXiv 2402.06126).

    The bias is ours: with it training starts from "every expert on" (G near 1).
    """

    def __init__(self, width: int, routed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(routed, width))
        self.bias = nn.Parameter(torch.full((routed,), 3.0))

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """Every expert on, for every token."""
        return cls(ffn.weights().up_FD.shape[1], importance.routed, **options)

    def flops(self) -> int:
        """One layer."""
        return matrix_flops(self.weight)

    def logits_TR(self, x_TD: Tensor) -> Tensor:
        """Scores before the sigmoid."""
        with in_fp32(x_TD):
            return nn.functional.linear(x_TD.float(), self.weight.float(), self.bias.float())
