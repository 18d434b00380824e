"""Activations that turn into ReLU while a model trains: the beta of Swish rises step by step.

A swap from SiLU to ReLU throws away a third of what an FFN puts out, all at once; Swish with beta
1 is SiLU itself, and ReLU is where beta ends. Both ends are swaps: to `swish_beta`, which changes
nothing of a SiLU model, and after the train step to `relu`, which then changes little.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moe_tools.experts.conversion import read_conversion, write_conversion
from moe_tools.hosts.activations import Swish


def swishes(model: nn.Module) -> list[Swish]:
    """The activations whose beta can rise, each once."""
    return [module for module in model.modules() if isinstance(module, Swish)]


def sharpening(model: nn.Module, beta: float | None, ramp: float) -> Sharpening | None:
    """What raises the betas of a train step; None: nothing does."""
    return None if beta is None else Sharpening(model, beta, ramp)


def check_sharpens(model: nn.Module) -> None:
    """Checks that there is a beta to raise.

    Raises:
        ValueError: no FFN has a Swish, or one starts at 0, which no ratio raises.
    """
    if any(module.beta == 0 for module in swishes(model)):
        raise ValueError("beta rises by ratios, and starts at 0: let `swap` give it one above 0")
    if not swishes(model):
        raise ValueError(
            "beta rises in Swish alone: put `swap: {activation: {kind: swish_beta}}` before this "
            "train step"
        )


class Sharpening:
    """Raises every beta by one ratio a step, from where it is to `beta`, in the first steps."""

    def __init__(self, model: nn.Module, beta: float, ramp: float) -> None:
        """Takes the betas as they are at the start of the train step.

        Args:
            model: has Swishes.
            beta: where all of them end.
            ramp: share of the steps in which they get there; 0: at once.
        """
        self.starts = [(module, module.beta) for module in swishes(model)]
        self.beta, self.ramp = beta, ramp

    def enter(self, step: int, steps: int) -> None:
        """Sets the betas of one optimizer step, counted from 1."""
        done = 1.0 if self.ramp <= 0 else min(1.0, (step - 1) / (self.ramp * steps))
        for module, start in self.starts:
            module.beta = start * (self.beta / start) ** done


def write_betas(model: nn.Module, beta: float) -> None:
    """Says in the config's block where all betas have ended, and sets them there."""
    for module in swishes(model):
        module.beta = beta
    conversion = read_conversion(model)
    assert conversion is not None and conversion.activation is not None
    own = {name: _at(spec, beta) for name, spec in conversion.activation_of.items()}
    activation = _at(conversion.activation, beta)
    write_conversion(model, replace(conversion, activation=activation, activation_of=own))


def _at(spec: dict[str, Any], beta: float) -> dict[str, Any]:
    return {**spec, "beta": beta} if spec.get("kind") == "swish_beta" else spec
