"""LTE's router. Letters: T tokens, D model width, F neurons, R experts that are routed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.model.ffn import FFN
from moe_tools.model.importance import Importance
from moe_tools.model.routers.base import LearnedRouter, in_fp32
from moe_tools.model.routers.labels import label_loss


class SigmoidRouter(LearnedRouter):
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

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR in (0, 1)."""
        return torch.sigmoid(self._logits_TR(x_TD))

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """The experts' magnitudes."""
        return importance.magnitude_TR(h_TF)

    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """As MoEfication's router has it."""
        return label_loss(self._logits_TR(x_TD), target_TR)

    def flops(self) -> int:
        """Multiply and add for each weight."""
        return 2 * self.weight.numel()

    def _logits_TR(self, x_TD: Tensor) -> Tensor:
        with in_fp32(x_TD):
            return nn.functional.linear(x_TD.float(), self.weight.float(), self.bias.float())
