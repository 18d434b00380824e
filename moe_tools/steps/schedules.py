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


def warmup_cosine(step: int, steps: int, warmup: float, floor: float = 0.1) -> float:
    """The factor on a learning rate: linear to 1, then a cosine down to `floor`."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


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
