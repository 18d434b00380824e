"""Ranges of a step's values that a type cannot express."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, fields
from typing import Any

from moe_tools.recipe.step import Stage, Step, Train, step_name

AT_LEAST_1 = ("tokens", "expert_size", "batch_size", "accumulate", "checkpoint_every")
SHARES = ("target_sparsity", "start_sparsity", "max_error")
"""Strictly between 0 and 1."""


def check_step(step: Step) -> None:
    """Ranges that a type cannot express.

    Raises:
        ValueError: the key, its value and the rule.
    """
    for item in fields(step):
        value = getattr(step, item.name)
        if item.name in AT_LEAST_1:
            _require(value >= 1, step, item.name, value, "at least 1")
        if item.name in ("lr", "router_lr", "shared_experts", "epochs"):
            _require(value >= 0, step, item.name, value, "0 or more")
        if item.name in ("warmup", "ramp"):
            _require(0 <= value <= 1, step, item.name, value, "in [0, 1]")
        if item.name in SHARES and value is not None:
            _require(0 < value < 1, step, item.name, value, "strictly between 0 and 1")
    if isinstance(step, Train):
        _check_drive(step)
        if step.lora is not None:
            for key, value in asdict(step.lora).items():
                _require(value >= 1, step, f"lora.{key}", value, "at least 1")
            _require(step.parts != "routers", step, "lora with parts", step.parts, "all or ffn")
        for name, weight in step.losses.items():
            if isinstance(weight, tuple):
                _check_stages(step, f"losses.{name}", weight)


def _check_drive(step: Train) -> None:
    if step.drive != "shift" and step.target_sparsity is None:
        raise ValueError(f"train: drive {step.drive} needs a target_sparsity to drive to")
    loss = {"eta": "efficiency"}.get(step.drive, step.drive)
    if isinstance(step.losses.get(loss), tuple):
        raise ValueError(f"train: drive {step.drive} sets the weight of {loss}: give it no stages")


def _check_stages(step: Train, key: str, stages: tuple[Stage, ...]) -> None:
    ends = [0.0, *(stage.until for stage in stages)]
    rising = all(before < after for before, after in itertools.pairwise(ends))
    known = rising and 0 < ends[-1] < math.inf
    _require(known, step, f"until of {key}", ends[1:], "rising numbers above 0, at least one")
    for i, stage in enumerate(stages):
        valid = 0 <= stage.weight < math.inf
        _require(valid, step, f"{key}[{i}].weight", stage.weight, "0 or more, and finite")


def _require(holds: bool, step: Step, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{step_name(step)}: {key} is {value}, but must be {rule}")
