"""The loss of routers that learn labels. Letters: T tokens, R experts that are routed."""

from __future__ import annotations

from torch import Tensor, nn


def label_loss(logits_TR: Tensor, target_TR: Tensor) -> Tensor:
    """Binary cross entropy with target / max over the experts (MoEfication, arXiv 2110.01786)."""
    label_TR = target_TR / target_TR.amax(-1, keepdim=True).clamp_min(1e-12)
    return nn.functional.binary_cross_entropy_with_logits(logits_TR, label_TR)
