"""Routers that learn labels. Letters: T tokens, D model width, F neurons, R routed experts."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from moe_tools.model.importance import Importance
from moe_tools.model.routers.base import LearnedRouter


class LabelRouter(LearnedRouter):
    """Scores in (0, 1) that learn the share of the largest magnitude (MoEfication, 2110.01786)."""

    @abstractmethod
    def logits_TR(self, x_TD: Tensor) -> Tensor:
        """Scores before the sigmoid, in fp32."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR in (0, 1)."""
        return torch.sigmoid(self.logits_TR(x_TD))

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """The experts' magnitudes."""
        return importance.magnitude_TR(h_TF)

    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """Binary cross entropy with target / max over the experts."""
        label_TR = target_TR / target_TR.amax(-1, keepdim=True).clamp_min(1e-12)
        return nn.functional.binary_cross_entropy_with_logits(self.logits_TR(x_TD), label_TR)
