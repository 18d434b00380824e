"""Schedules over optimizer steps, as plain functions of (step, steps)."""

from __future__ import annotations

import math

from moe_tools.recipe import Weight


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
