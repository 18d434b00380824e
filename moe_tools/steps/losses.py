"""Losses a recipe can name. Letters: T tokens, D model width, E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_tools.model.routing import Routing
from moe_tools.registry import Registry

SEPARABILITY_MARGIN = 0.1
"""Closest distance to tau that separability still sees: the loss and its gradient stay finite."""


class Observed(NamedTuple):
    """What one forward pass of model (and donor) showed."""

    routings: Sequence[Routing]
    outputs_TD: Sequence[Tensor]
    """Output of every FFN's down projection."""
    donor_outputs_TD: Sequence[Tensor]
    """The same of the donor; empty without one."""


def efficiency(seen: Observed) -> Tensor:
    """mean over FFNs, tokens and experts of G^2 (LTE, arXiv 2402.06126)."""
    return torch.stack([routing.scores_TE.square().mean() for routing in seen.routings]).mean()


def separability(seen: Observed, tau: float = 0.5) -> Tensor:
    """mean of 1 / (G - tau)^2: pushes scores away from the threshold (LTE, arXiv 2402.06126).

    Bounded by 1 / margin^2: (G - tau)^2 + margin^2 stands where the paper has (G - tau)^2, which
    is unbounded just where a fresh router starts.
    """
    return torch.stack(
        [
            ((routing.scores_TE - tau).square() + SEPARABILITY_MARGIN**2).reciprocal().mean()
            for routing in seen.routings
        ]
    ).mean()


def distill_ffn(seen: Observed) -> Tensor:
    """mean over FFNs of ||y - y_donor||^2 / ||y_donor||^2, summed over tokens of the batch."""
    pairs = zip(seen.outputs_TD, seen.donor_outputs_TD, strict=True)
    errors = [
        (y.float() - donor.float()).square().sum() / donor.float().square().sum().clamp_min(1e-12)
        for y, donor in pairs
    ]
    return torch.stack(errors).mean()


LOSSES: Registry[Callable[[Observed], Tensor]] = Registry(
    "loss",
    {"efficiency": efficiency, "separability": separability, "distill_ffn": distill_ffn},
)
"""Losses beside the two that the logits give (`lm`, `distill`)."""
LOGIT_LOSSES = ("lm", "distill")
DONOR_LOSSES = ("distill", "distill_ffn")
"""Losses that need the donor's forward pass."""
