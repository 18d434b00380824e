"""A process that dies: at a forward pass, or wherever a test raises it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


class Killed(BaseException):
    """As a signal: nothing catches it."""


def kill_at(model: PreTrainedModel, forward_pass: int) -> None:
    """Dies at the start of a forward pass, counted from 1."""
    count = 0

    def die(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == forward_pass:
            raise Killed

    model.base_model.register_forward_pre_hook(die)
