"""D2DMoE's router. Letters: T tokens, D model width, F neurons, R experts that are routed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import LearnedRouter, LinearFP32, in_fp32, matrix_flops
from moe_tools.hosts.ffn import FFN


class NormRouter(LearnedRouter):
    """|MLP(x)|, a regression of the norm of each expert's output (D2DMoE, arXiv 2310.04361).

    The MLP has two layers and `hidden` units (128 to 512 in the paper). It predicts multiples of
    the mean norm, so that one learning rate fits every FFN.
    """

    scale: Tensor

    def __init__(self, width: int, routed: int, hidden: int = 128) -> None:
        super().__init__()
        if not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"a norm router needs hidden >= 1, not {hidden!r}")
        self.first = LinearFP32(width, hidden)
        self.second = LinearFP32(hidden, routed)
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """At random; the option is `hidden`."""
        return cls(ffn.width, importance.routed, **options)

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR: predicted norms, 0 or more."""
        return self._multiples_TR(x_TD) * self.scale

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """The norms of the experts' outputs."""
        return importance.norm_TR(h_TF)

    def prepare(self, target_TR: Tensor) -> None:
        """The mean norm becomes the unit."""
        self.scale.copy_(target_TR.float().mean().clamp_min(1e-12))

    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """Mean squared error, in units of the mean norm."""
        return nn.functional.mse_loss(self._multiples_TR(x_TD), target_TR / self.scale)

    def flops(self) -> int:
        return matrix_flops(self.first.weight, self.second.weight)

    def _multiples_TR(self, x_TD: Tensor) -> Tensor:
        with in_fp32(x_TD):
            hidden = nn.functional.gelu(self.first(x_TD))
            return self.second(hidden).abs()
