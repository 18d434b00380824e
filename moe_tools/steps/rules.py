"""Ranges of a step's options that a type cannot express."""

from __future__ import annotations

from typing import Any


def require(holds: bool, step: Any, key: str, value: Any, rule: str) -> None:
    """Raises a ValueError with the key, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{step.verb}: {key} is {value}, but must be {rule}")


def at_least(least: float, step: Any, *keys: str) -> None:
    """Requires numbers of at least `least`."""
    rule = "0 or more" if least == 0 else f"at least {least}"
    for key in keys:
        value = getattr(step, key)
        require(value >= least, step, key, value, rule)


def from_0_to_1(step: Any, *keys: str) -> None:
    """Requires numbers from 0 to 1, both included."""
    for key in keys:
        value = getattr(step, key)
        require(0 <= value <= 1, step, key, value, "in [0, 1]")


def strictly_between_0_and_1(step: Any, *keys: str) -> None:
    """Requires numbers strictly between 0 and 1; None is no number and passes."""
    for key in keys:
        value = getattr(step, key)
        valid = value is None or 0 < value < 1
        require(valid, step, key, value, "strictly between 0 and 1")
