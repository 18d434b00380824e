"""Published schedules of lambda, in the unit of our loss `l1`. No torch.

ProSparse (arXiv 2402.13516) adds lambda(t) * sum_l ||h^l||_1 to the language loss, and does not say
over which tokens the norm is taken. Public training code of the same group does: in one forward
pass on one device, each FFN adds `torch.norm(h, p=1) * 1e-8`, a sum over all its tokens and
neurons, and lambda multiplies the sum over the FFNs (github.com/thunlp/BlockFFN, pretrain). We take
that to be ProSparse's unit; with a mean over tokens, a lambda of 0.2 would outweigh the language
loss many times. Our `l1` is the mean over tokens and FFNs, so that

    weight = lambda * 1e-8 * tokens of a forward pass * FFNs.

How many tokens a device had in a forward pass is not published. The context is 4096 tokens, and we
assume one block, the least there can be: with more, weights grow in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_tools.recipe import Stage

SUM_UNIT = 1e-8
"""What the public code multiplies the sum by."""
CONTEXT = 4096
"""Tokens of a block (appendix L of arXiv 2402.13516)."""


@dataclass(frozen=True)
class Schedule:
    """A row of tables 6 and 7 of arXiv 2402.13516."""

    ffns: int
    """Layers: 32 and 40 of LLaMA-2 (arXiv 2307.09288), 52 of MiniCPM-1B (arXiv 2404.06395)."""
    batch_tokens: int
    """Tokens of an optimizer step: the accumulated tokens of the table over its steps."""
    lambdas: tuple[tuple[int, float], ...]
    """(last optimizer step, lambda) of each stage. Stage 0 continues training after the swap
    without a penalty, stage 1 has a fixed lambda, and from stage 2 on lambda follows a sine."""


PROSPARSE = {
    "1b": Schedule(  # the stages before MiniCPM's own decay and instruction tuning
        ffns=52,
        batch_tokens=1200 * CONTEXT,
        lambdas=((10_000, 0.0), (15_000, 1e-3), (20_000, 5e-3), (25_000, 5e-3), (35_000, 5e-2)),
    ),
    "7b": Schedule(
        ffns=32,
        batch_tokens=512 * CONTEXT,
        lambdas=(
            *((5_000, 0.0), (6_000, 5e-3), (10_000, 5e-2)),
            *((12_000, 5e-2), (16_000, 2e-1), (16_500, 2e-1)),
        ),
    ),
    "13b": Schedule(
        ffns=40,
        batch_tokens=2048 * CONTEXT,
        lambdas=(
            *((5_500, 0.0), (6_750, 5e-3), (10_750, 1e-2)),
            *((11_000, 1e-2), (15_000, 2e-2), (16_000, 2e-2)),
        ),
    ),
}


def l1_weight(factor: float, *, ffns: int, forward_tokens: int = CONTEXT) -> float:
    """The weight of our `l1` that does what `factor` does to the sum in the public code.

    Args:
        factor: lambda as it is published.
        ffns: over which the published loss sums, and ours takes the mean.
        forward_tokens: of one device in one forward pass there.
    """
    return factor * SUM_UNIT * forward_tokens * ffns


def l1_stages(schedule: Schedule, *, forward_tokens: int = CONTEXT) -> tuple[Stage, ...]:
    """A published schedule as the stages of `l1`, `until` in optimizer steps."""
    return tuple(
        Stage(
            until=float(last_step),
            weight=l1_weight(factor, ffns=schedule.ffns, forward_tokens=forward_tokens),
            curve="constant" if index == 1 else "sine",
        )
        for index, (last_step, factor) in enumerate(schedule.lambdas)
    )
