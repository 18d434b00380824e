"""MoEfication's router. Letters: T tokens, D model width, F neurons, R experts that are routed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.model.ffn import FFN
from moe_tools.model.importance import Importance
from moe_tools.model.routers.base import LearnedRouter, in_fp32
from moe_tools.model.routers.labels import label_loss
from moe_tools.model.routers.rows import mean_rows_RD


class MLPRouter(LearnedRouter):
    """sigmoid(W_2 tanh(W_1 x / ||x||)) (MoEfication, arXiv 2110.01786).

    W_1 starts at the mean rows of the experts, W_2 at the identity.
    """

    def __init__(self, width: int, routed: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, routed, bias=False)
        self.second = nn.Linear(routed, routed, bias=False)

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """At the paper's start."""
        router = cls(ffn.weights().up_FD.shape[1], importance.routed, **options)
        with torch.no_grad():
            router.first.weight.copy_(mean_rows_RD(ffn.weights().routing_FD, importance))
            nn.init.eye_(router.second.weight)
        return router

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR in (0, 1)."""
        return torch.sigmoid(self._logits_TR(x_TD))

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """The experts' magnitudes."""
        return importance.magnitude_TR(h_TF)

    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """Binary cross entropy."""
        return label_loss(self._logits_TR(x_TD), target_TR)

    def flops(self) -> int:
        """Multiply and add for each weight."""
        return 2 * (self.first.weight.numel() + self.second.weight.numel())

    def _logits_TR(self, x_TD: Tensor) -> Tensor:
        with in_fp32(x_TD):
            unit_TD = nn.functional.normalize(x_TD.float(), dim=-1)
            return self.second(torch.tanh(self.first(unit_TD)))
