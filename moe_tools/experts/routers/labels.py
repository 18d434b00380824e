"""Routers that learn labels. Letters: T tokens, D model width, F neurons, R routed experts."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import LearnedRouter


class LabelRouter(LearnedRouter):
    """Scores in (0, 1) that learn labels in [0, 1] by binary cross entropy.

    The label is the share of the token's largest magnitude (MoEfication, arXiv 2110.01786), unless
    a kind says otherwise.
    """

    positive_weight: float = 1.0
    """What a label of 1 counts for in the loss, where a label of 0 counts for 1."""

    @abstractmethod
    def logits_TR(self, x_TD: Tensor) -> Tensor:
        """Scores before the sigmoid, in fp32."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR in (0, 1)."""
        return torch.sigmoid(self.logits_TR(x_TD))

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """The experts' magnitudes."""
        return importance.magnitude_TR(h_TF)

    def label_TR(self, target_TR: Tensor) -> Tensor:
        """target / max over the experts."""
        return target_TR / target_TR.amax(-1, keepdim=True).clamp_min(1e-12)

    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """Binary cross entropy with the labels, weighed, and averaged over tokens and experts."""
        logits_TR = self.logits_TR(x_TD)
        weight = logits_TR.new_tensor(self.positive_weight)
        return nn.functional.binary_cross_entropy_with_logits(
            logits_TR, self.label_TR(target_TR), pos_weight=weight
        )
