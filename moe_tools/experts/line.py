"""The line between on and off, moved for all FFNs together so that a stated share is off.

The order of the scores is what a router learned, or what the weights say; a shift only says where
the line falls. All FFNs get the same shift, on the scale on which scores are compared: logits of
sigmoid routers, whose bias moves; logarithms of scores that have a ratio scale, whose tau moves. So
the shares that FFNs have of the whole, by training or by a budget, stay what they are.

Letters: T tokens, E experts, N scores of an FFN, S scores of a sample or their distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.experts.sampling import sample_share
from moe_tools.experts.selectors import Threshold

SAMPLE = 2**21
"""Scores that are looked at after an optimizer step, of all its tokens: 8 MB."""
BEYOND = 1.0
"""Distance of the line from the scores, on their scale, where all are on one side of it."""
LEAST_TAU = 1e-6
"""A threshold of scores between 0 and 1 has a logit from here to as far below 1."""
SMALLEST = 1e-30
"""A score of 0 has no logarithm: it counts as this one."""


def check_thresholds(model: nn.Module) -> None:
    """Checks that every FFN has a line to move: a threshold, of scores that a shift fits.

    Raises:
        ValueError: another selector, or scores that have neither a bias nor a ratio scale.
    """
    for ffn in expert_ffns(model):
        if not isinstance(ffn.selector, Threshold):
            raise ValueError(
                f"{ffn.name}: a target sparsity needs a threshold; with top-k, k sets the sparsity"
            )
        if ffn.router.logit_bias is None and not ffn.router.ratio_scale:
            raise ValueError(
                f"{ffn.name}: a target sparsity needs sigmoid routers with a bias, or scores of 0 "
                f"or more, and {type(ffn.router).__name__} has neither"
            )


def check_movable(model: nn.Module) -> None:
    """Checks that one shift moves the line of every FFN from where it is.

    Raises:
        ValueError: as `check_thresholds`; a threshold of 0, which a ratio leaves at 0; or one that
            no score of a sigmoid is on one side of, and that has no logit.
    """
    check_thresholds(model)
    for ffn in expert_ffns(model):
        assert isinstance(ffn.selector, Threshold)
        tau, biased = ffn.selector.tau, ffn.router.logit_bias is not None
        if biased and not LEAST_TAU <= tau <= 1 - LEAST_TAU:
            raise ValueError(
                f"{ffn.name}: a target sparsity moves scores between 0 and 1 across their "
                f"threshold, and tau is {tau:g}: set it between, e.g. at 0.5"
            )
        if not biased and tau <= 0:
            raise ValueError(
                f"{ffn.name}: a target sparsity moves a threshold by ratios, and tau is {tau:g}: "
                "a `budget` by itself (spend: uniform) sets one above 0"
            )


@torch.no_grad()
def sample_distances(model: nn.Module, routings: Iterable[Routing], passes: int = 1) -> Tensor:
    """Returns distance_S: how far a sample of scores is above the line, on their own scale.

    Args:
        model: whose routings they are.
        routings: of one pass.
        passes: that share the sample.
    """
    seen = {routing.ffn: routing.scores_TE.flatten(0, -2) for routing in routings}
    return distances_of(expert_ffns(model), seen, max(1, SAMPLE // passes))


@torch.no_grad()
def distances_of(ffns: Sequence[ExpertFFN], seen: Mapping[str, Tensor], most: int) -> Tensor:
    """Distances of about `most` scores in all, or of fewer where there are fewer.

    The same share of each FFN's scores_TE: so an expert of an MoE host counts as often as the host
    chose it. Of many scores some of every token, as tokens differ more than experts do.
    """
    scores = {ffn: seen[ffn.name][:, ffn.shared :].flatten() for ffn in ffns if ffn.name in seen}
    share = most / max(1, sum(map(len, scores.values())))
    return torch.cat([_distances(ffn, sample_share(one, share)) for ffn, one in scores.items()])


def _distances(ffn: ExpertFFN, score_S: Tensor) -> Tensor:
    assert isinstance(ffn.selector, Threshold)  # check_movable
    tau = torch.full((), ffn.selector.tau, device=score_S.device)  # no copy to wait for
    if ffn.router.logit_bias is not None:
        return score_S.logit(eps=1e-6) - tau.logit()
    return score_S.clamp_min(SMALLEST).log() - tau.log()


@torch.no_grad()
def add_(param: nn.Parameter, value: Tensor) -> None:
    """Adds `value` to a parameter."""
    param.add_(value)


@torch.no_grad()
def move_line(
    model: nn.Module,
    distance_S: Tensor,
    sparsity: float,
    damping: float = 1.0,
    add: Callable[[nn.Parameter, Tensor], None] = add_,
) -> Tensor:
    """Moves the line by `damping` times what turns the share `sparsity` of all neurons off.

    Shared experts stay on, so of the others a larger share is turned off. `add` moves a bias, where
    a weight is more than its tensor. What is set on FFNs is in the config when the model is saved.
    Returns the shift: how much further above the line all scores are now.
    """
    ffns = expert_ffns(model)
    shift = -damping * _line(distance_S, sparsity / _routed_share(ffns))
    for ffn in ffns:
        if ffn.router.logit_bias is not None:
            add(ffn.router.logit_bias, shift)
        else:
            assert isinstance(ffn.selector, Threshold)  # check_movable
            tau = ffn.selector.tau * float((-shift).exp())
            ffn.selector = replace(ffn.selector, tau=tau)
    return shift


def _line(distance_S: Tensor, share: float) -> Tensor:
    """Finds the value below which the share of the scores is nearest to `share`.

    Equal scores lie on one side of it. It is in the middle between its neighbours: a line on a
    score would leave to rounding whether all that are equal to it are on or off.
    """
    wanted = share * len(distance_S)
    place = min(len(distance_S), max(1, round(wanted)))
    last = distance_S.kthvalue(place).values
    fewer, more = (distance_S < last).sum(), (distance_S <= last).sum()
    lower = torch.where(distance_S < last, distance_S, -torch.inf).amax()
    higher = torch.where(distance_S > last, distance_S, torch.inf).amin()
    off = more - wanted <= wanted - fewer
    low, high = torch.where(off, last, lower), torch.where(off, higher, last)
    low = torch.where(low.isinf(), high - 2 * BEYOND, low)
    high = torch.where(high.isinf(), low + 2 * BEYOND, high)
    return (low + high) / 2


def _routed_share(ffns: list[ExpertFFN]) -> float:
    """Returns the share of the neurons that a router can turn off."""
    routed = sum(sum(ffn.division.sizes[ffn.shared :]) for ffn in ffns)
    return routed / sum(ffn.division.neurons for ffn in ffns)
