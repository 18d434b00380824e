"""Schedules over optimizer steps, as plain functions of (step, steps)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_tools.steps.rules import require


@dataclass(frozen=True)
class Stage:
    """A part of a train step, and the weight that a loss has at its end."""

    until: float
    """Where it ends, in any unit, e.g. thousands of steps: the last stage ends with the step."""
    weight: float
    curve: Literal["sine", "constant"] = "sine"
    """From the weight of the stage before along half a sine (ProSparse, arXiv 2402.13516), or the
    stage's own weight from its first step. The first stage is constant."""


Weight = float | tuple[Stage, ...]
"""The weight of a loss: the same in every optimizer step, or led through stages."""


def check_stages(step: Any, key: str, stages: Sequence[Stage]) -> None:
    """Requires ends that rise from above 0, and weights of 0 or more."""
    ends = [0.0, *(stage.until for stage in stages)]
    rising = all(before < after for before, after in itertools.pairwise(ends))
    known = rising and 0 < ends[-1] < math.inf
    require(known, step, f"until of {key}", ends[1:], "rising numbers above 0, at least one")
    for i, stage in enumerate(stages):
        valid = 0 <= stage.weight < math.inf
        require(valid, step, f"{key}[{i}].weight", stage.weight, "0 or more, and finite")


def is_ever_on(weight: Weight) -> bool:
    """Whether a loss counts in any optimizer step."""
    return any(stage.weight for stage in weight) if isinstance(weight, tuple) else weight != 0


Warmup = float | int
"""A share of the optimizer steps, below 1, or, where it is an int, optimizer steps."""
Fall = Literal["cosine", "linear", "constant"]
"""How a learning rate falls after its warm-up."""


def check_warmup(step: Any, warmup: Warmup) -> None:
    """Checks that a warm-up is a share or a number of steps, and no number that could be both.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(warmup, int) and not isinstance(warmup, bool):
        require(warmup >= 0, step, "warmup", warmup, "0 optimizer steps or more")
        return
    rule = "a share in [0, 1), or a whole number of optimizer steps: write 1 for one of them"
    require(0 <= warmup < 1, step, "warmup", warmup, rule)


def warmup_steps(warmup: Warmup, steps: int) -> int:
    """Optimizer steps until the peak, of `steps`; at least 1, which starts there."""
    return max(1, warmup if isinstance(warmup, int) else round(warmup * steps))


def rate_factor(
    step: int, steps: int, warmup: Warmup, floor: float = 0.1, fall: Fall = "cosine"
) -> float:
    """The factor on a learning rate: linear to 1, then down to `floor`, or not at all.

    Args:
        step: optimizer step, counted from 0.
        steps: optimizer steps of the train step; the floor is reached after the last.
        warmup: until the peak.
        floor: where it ends, as a share of the peak; `constant` ends at 1.
        fall: along half a cosine, along a line, or constant.
    """
    warm = warmup_steps(warmup, steps)
    if step < warm:
        return (step + 1) / warm
    if fall == "constant":
        return 1.0
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    left = 1 - progress if fall == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * left


def warmup_cosine(step: int, steps: int, warmup: Warmup, floor: float = 0.1) -> float:
    """The factor on a learning rate: linear to 1, then a cosine down to `floor`."""
    return rate_factor(step, steps, warmup, floor)


def weight_at(weight: Weight, step: int, steps: int) -> float:
    """The weight of a loss in an optimizer step; a stage ends with its own weight.

    In stage i, for t in (T_{i-1}, T_i], as in algorithm 1 of ProSparse (arXiv 2402.13516):
    eta = 1/2 [sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1],
    lambda(t) = lambda_{i-1} + eta (lambda_i - lambda_{i-1}); the first stage is constant.

    Args:
        weight: a number, or stages; `steps` is where the last one ends.
        step: t, counted from 1.
        steps: optimizer steps of the train step.
    """
    if not isinstance(weight, tuple):
        return weight
    share, begin, before = step / steps, 0.0, weight[0].weight
    for stage in weight:  # shares: 29 of 100 steps is 0.29 of them, though 0.29 * 100 < 29
        end = stage.until / weight[-1].until
        if share <= end:
            break
        begin, before = end, stage.weight
    if stage.curve == "constant":
        return stage.weight
    eta = 0.5 * (math.sin(math.pi * ((share - begin) / (end - begin) - 0.5)) + 1)
    return before + eta * (stage.weight - before)
