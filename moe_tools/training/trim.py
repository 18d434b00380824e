"""Trim: shift all routers by one constant so that a stated share of the experts is off.

The order of the scores is what a router learned; the constant only says where the line falls.
Letters: T tokens, E experts, R experts that are routed, S sampled scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.experts.selectors import Threshold

SAMPLE = 256
"""Tokens whose scores are looked at: 1.5 million scores at 192 experts and 30 FFNs."""
LEAST = 8
"""Tokens of each pass, however many passes share the sample: with 2,048 of them, which papers
take, 256 of each would be 12 GB of scores."""
BEYOND = 1.0
"""Distance of the line from the scores, on the logit scale, where all are on one side of it."""


def check_trimmable(model: nn.Module) -> None:
    """Checks that every router has a bias under a threshold, which a shift moves.

    Raises:
        ValueError: another kind of router or selector.
    """
    for ffn in expert_ffns(model):
        if ffn.router.logit_bias is None or not isinstance(ffn.selector, Threshold):
            raise ValueError(
                f"{ffn.name}: a target sparsity needs sigmoid routers under a threshold, with a "
                "bias; with top-k, k sets the sparsity"
            )


@torch.no_grad()
def sample_logits(model: nn.Module, routings: Iterable[Routing], passes: int = 1) -> Tensor:
    """Returns logits_S: how far a sample of scores is above the threshold, on the logit scale.

    Args:
        model: whose routings they are.
        routings: of one pass.
        passes: that share the sample.
    """
    ffns = {ffn.name: ffn for ffn in expert_ffns(model)}
    tokens = max(LEAST, SAMPLE // passes)
    return torch.cat([_sample(ffns[r.ffn], r.scores_TE, tokens).flatten() for r in routings])


def _sample(ffn: ExpertFFN, scores_TE: Tensor, tokens: int) -> Tensor:
    assert isinstance(ffn.selector, Threshold)  # check_trimmable
    scores_TR = scores_TE.flatten(0, -2)[:, ffn.shared :]
    tau = torch.full((), ffn.selector.tau, device=scores_TR.device)  # no copy to wait for
    return scores_TR[:: max(1, len(scores_TR) // tokens)].logit(eps=1e-6) - tau.logit()


@torch.no_grad()
def add_(param: nn.Parameter, value: Tensor) -> None:
    """Adds `value` to a parameter."""
    param.add_(value)


@torch.no_grad()
def shift_routers(
    model: nn.Module,
    logits_S: Tensor,
    sparsity: float,
    damping: float = 1.0,
    add: Callable[[nn.Parameter, Tensor], None] = add_,
) -> None:
    """Moves every bias by `damping` times what turns the share `sparsity` of all neurons off.

    Shared experts stay on, so of the others a larger share is turned off. `add` moves it, where a
    weight is more than its tensor.
    """
    shift = -damping * _line(logits_S, sparsity / _routed_share(model))
    for ffn in expert_ffns(model):
        assert ffn.router.logit_bias is not None  # check_trimmable
        add(ffn.router.logit_bias, shift)


def _line(logits_S: Tensor, share: float) -> Tensor:
    """Finds the value below which the share of the scores is nearest to `share`.

    Equal scores lie on one side of it. It is in the middle between its neighbours: a line on a
    score would leave to rounding whether all that are equal to it are on or off.
    """
    wanted = share * len(logits_S)
    place = min(len(logits_S), max(1, round(wanted)))
    last = logits_S.kthvalue(place).values
    fewer, more = (logits_S < last).sum(), (logits_S <= last).sum()
    lower = torch.where(logits_S < last, logits_S, -torch.inf).amax()
    higher = torch.where(logits_S > last, logits_S, torch.inf).amin()
    off = more - wanted <= wanted - fewer
    low, high = torch.where(off, last, lower), torch.where(off, higher, last)
    low = torch.where(low.isinf(), high - 2 * BEYOND, low)
    high = torch.where(high.isinf(), low + 2 * BEYOND, high)
    return (low + high) / 2


def _routed_share(model: nn.Module) -> float:
    """Returns the share of the neurons that a router can turn off."""
    ffns = expert_ffns(model)
    routed = sum(sum(ffn.division.sizes[ffn.shared :]) for ffn in ffns)
    return routed / sum(ffn.division.neurons for ffn in ffns)
