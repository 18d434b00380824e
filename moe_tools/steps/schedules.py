"""Schedules over optimizer steps, as plain functions of (step, steps)."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: float, floor: float = 0.1) -> float:
    """The factor on a learning rate: linear to 1, then a cosine down to `floor`."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
