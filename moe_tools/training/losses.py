"""Losses a recipe can name. Letters: T tokens, D model width, F neurons, E experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from moe_tools.experts.routing import Routing
from moe_tools.registry import Registry
from moe_tools.training.watch import Kind

SEPARABILITY_MARGIN = 0.1
"""Closest distance to tau that separability still sees: the loss and its gradient stay finite."""


PRE_FLOOR = -10.0
"""Pre-activations below are off for good: GELU and SiLU are flat there."""


class Observed(NamedTuple):
    """What one forward pass of model (and donor) showed, of every FFN."""

    routings: Sequence[Routing] = ()
    outputs_TD: Mapping[str, Tensor] = MappingProxyType({})
    """By name, see `FFNTensors.outputs`."""
    donor_outputs_TD: Mapping[str, Tensor] = MappingProxyType({})
    """The same of the donor; empty without one."""
    hidden_TF: Sequence[Tensor] = ()
    """What enters the down projection."""
    pre_TF: Sequence[Tensor] = ()
    """What enters the activation."""


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
    """mean over FFNs of ||y - y_donor||^2 / ||y_donor||^2, summed over tokens of the batch.

    FFNs pair by name; all experts of an MoE layer together are one.
    """
    assert seen.outputs_TD.keys() == seen.donor_outputs_TD.keys()
    pairs = [(y, seen.donor_outputs_TD[name]) for name, y in seen.outputs_TD.items()]
    errors = [
        (y.float() - donor.float()).square().sum() / donor.float().square().sum().clamp_min(1e-12)
        for y, donor in pairs
    ]
    return torch.stack(errors).mean()


def l1(seen: Observed) -> Tensor:
    """sum over neurons of |h|, averaged over tokens and FFNs (D2DMoE, arXiv 2310.04361)."""
    return torch.stack([h_TF.float().abs().sum(-1).mean() for h_TF in seen.hidden_TF]).mean()


def hoyer(seen: Observed) -> Tensor:
    """(sum |h|)^2 / sum h^2 of each token, averaged over tokens and FFNs (arXiv 2310.04361).

    From 1 (one neuron fires) to F (all alike); the scale of h has no say.
    """
    ratios = [
        h_TF.float().abs().sum(-1).square() / h_TF.float().square().sum(-1).clamp_min(1e-12)
        for h_TF in seen.hidden_TF
    ]
    return torch.stack([ratio_T.mean() for ratio_T in ratios]).mean()


def clamped(seen: Observed) -> Tensor:
    """sum over neurons of max(pre-activation + 10, 0), averaged over tokens and FFNs.

    For activations that are never exactly 0 (D2DMoE, arXiv 2310.04361).
    """
    sums = [(pre_TF.float() - PRE_FLOOR).clamp_min(0).sum(-1).mean() for pre_TF in seen.pre_TF]
    return torch.stack(sums).mean()


LOSSES: Registry[Callable[[Observed], Tensor]] = Registry(
    "loss",
    {
        "efficiency": efficiency,
        "separability": separability,
        "distill_ffn": distill_ffn,
        "l1": l1,
        "hoyer": hoyer,
        "clamped": clamped,
    },
)
"""Losses beside the two that the logits give (`lm`, `distill`)."""
LOGIT_LOSSES = ("lm", "distill")
DONOR_LOSSES = ("distill", "distill_ffn")
"""Losses that need the donor's forward pass."""
WATCHED: dict[str, Kind] = {
    "distill_ffn": "outputs",
    "l1": "hidden",
    "hoyer": "hidden",
    "clamped": "pre",
}
"""What a loss sees of the FFNs beside their routings: a list of `FFNTensors`."""
