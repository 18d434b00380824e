"""Losses a recipe can name.

Letters: T tokens, D model width, F neurons, E experts, R experts that are routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from moe_tools.experts.experts import Routing
from moe_tools.experts.importance import Importance
from moe_tools.experts.weighted import LEAST
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
    """The outputs of the donor's FFNs; empty without a donor."""
    hidden_TF: Sequence[Tensor] = ()
    """What enters the down projection."""
    pre_TF: Sequence[Tensor] = ()
    """What enters the activation."""
    experts: Sequence[Importance] = ()
    """The experts of every FFN in `hidden_TF`, where a loss asks for them."""


@dataclass(frozen=True)
class Loss:
    """A loss: how it is computed, and what has to be there for it."""

    compute: Callable[[Observed], Tensor] | None
    """A scalar with its graph; None: `logit_losses` computes it from the logits."""
    sees: Kind | None = None
    """What it looks at inside the FFNs beside their routings: a field of `FFNTensors`."""
    needs_routers: bool = False
    needs_experts: bool = False
    """It looks at the experts that a split made."""
    needs_donor: bool = False
    """It compares with the donor's forward pass on the same batch."""


def efficiency(seen: Observed) -> Tensor:
    """mean over FFNs, tokens and routed experts of G^2 (LTE, arXiv 2402.06126).

    Experts that are shared have no router, and no say here.
    """
    return torch.stack([routing.scores_TR.square().mean() for routing in seen.routings]).mean()


def separability(seen: Observed) -> Tensor:
    """mean of 1 / (G - tau)^2: pushes scores away from the threshold (LTE, arXiv 2402.06126).

    tau is that of each FFN's selector; of one without a fixed threshold, the score that decides for
    the token. Bounded by 1 / margin^2: (G - tau)^2 + margin^2 stands where the paper has
    (G - tau)^2, which is unbounded just where a fresh router starts.
    """
    return torch.stack([_closeness(routing) for routing in seen.routings]).mean()


def _closeness(routing: Routing) -> Tensor:
    scores_TR, tau_T1 = routing.scores_TR, routing.threshold_T1.detach()
    return ((scores_TR - tau_T1).square() + SEPARABILITY_MARGIN**2).reciprocal().mean()


def load_balance(seen: Observed) -> Tensor:
    """mean over FFNs of R sum_e f_e P_e (Switch Transformer, arXiv 2101.03961), for top-k and kin.

    f_e is the part that an expert has of all choices, P_e its part of each token's scores, averaged
    over tokens. It is 1 where all experts are as busy; no gradient goes through f. As in Mixtral
    (arXiv 2401.04088), whose own is k times as large; padding has no say.
    """
    return torch.stack([_imbalance(routing) for routing in seen.routings]).mean()


def _imbalance(routing: Routing) -> Tensor:
    scores_TR, mask_TR = routing.scores_TR, routing.mask_TE[..., routing.shared :]
    parts_TR = scores_TR / scores_TR.sum(-1, keepdim=True).clamp_min(LEAST)
    if routing.valid_T is not None:
        mask_TR = mask_TR & routing.valid_T[..., None]
        parts_TR = parts_TR * routing.valid_T[..., None]
    load_R, part_R = (each.flatten(0, -2).sum(0) for each in (mask_TR.to(parts_TR.dtype), parts_TR))
    load_R, part_R = (each / each.sum().clamp_min(LEAST) for each in (load_R, part_R))
    return len(load_R) * (load_R * part_R).sum()


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


def group_hoyer(seen: Observed) -> Tensor:
    """(sum_e m_e)^2 / sum_e m_e^2 of each token, averaged over tokens and FFNs.

    m_e^2 is the sum over the neurons of a routed expert of (h ||w_down||)^2. From 1 (one expert
    fires) to R (all alike): neurons of an expert learn to fire together, in a dense model that is
    split. Down rows have a gradient, too.
    """
    ratios = []
    for h_TF, experts in zip(seen.hidden_TF, seen.experts, strict=True):
        size_TR = (experts.log_energy_TR(h_TF) / 2).exp()
        ratios.append(size_TR.sum(-1).square() / size_TR.square().sum(-1))
    return torch.stack([ratio_T.mean() for ratio_T in ratios]).mean()


def clamped(seen: Observed) -> Tensor:
    """sum over neurons of max(pre-activation + 10, 0), averaged over tokens and FFNs.

    For activations that are never exactly 0 (D2DMoE, arXiv 2310.04361).
    """
    sums = [(pre_TF.float() - PRE_FLOOR).clamp_min(0).sum(-1).mean() for pre_TF in seen.pre_TF]
    return torch.stack(sums).mean()


LOSSES: Registry[Loss] = Registry(
    "loss",
    {
        "lm": Loss(None),
        "distill": Loss(None, needs_donor=True),
        "efficiency": Loss(efficiency, needs_routers=True),
        "separability": Loss(separability, needs_routers=True),
        "load_balance": Loss(load_balance, needs_routers=True),
        "distill_ffn": Loss(distill_ffn, sees="outputs", needs_donor=True),
        "l1": Loss(l1, sees="hidden"),
        "hoyer": Loss(hoyer, sees="hidden"),
        "group_hoyer": Loss(group_hoyer, sees="hidden", needs_experts=True),
        "clamped": Loss(clamped, sees="pre"),
    },
)


def needs_donor(names: Iterable[str]) -> bool:
    """Whether one of these losses compares with the donor."""
    return any(LOSSES[name].needs_donor for name in names)


def seen_kinds(names: Iterable[str]) -> set[Kind]:
    """What these losses look at inside the FFNs."""
    return {kind for name in names if (kind := LOSSES[name].sees) is not None}


def needs_experts(names: Iterable[str]) -> bool:
    """Whether one of these losses looks at the experts of a split."""
    return any(LOSSES[name].needs_experts for name in names)


def compute_losses(names: Iterable[str], seen: Observed) -> dict[str, Tensor]:
    """Every one of these losses that is not computed from the logits, by name."""
    pairs = [(name, LOSSES[name].compute) for name in names]
    return {name: compute(seen) for name, compute in pairs if compute is not None}
