"""Swap: another activation in every FFN. Letters: T tokens, D model width, F neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.data import Blocks
from moe_tools.experts.conversion import Conversion, conversion_so_far
from moe_tools.experts.swapped import check_swap, swap_activations
from moe_tools.hosts.activations import FATReLU
from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.hosts.projections import hidden_TF
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.rules import at_least, strictly_between_0_and_1
from moe_tools.steps.signs import align_signs
from moe_tools.steps.step import Step, Work

ROUNDS = 14
"""Halvings of the range of each theta, each a pass over the text."""


@dataclass(frozen=True)
class Swap(Step):
    """Another activation in every FFN."""

    verb = "swap"
    changes_function = True

    activation: dict[str, Any]
    """Its kind and what that takes, e.g. {kind: fatrelu, theta: 0.01}."""
    max_error: float | None = None
    """Chooses theta of fatrelu: in every FFN the largest at which ||y - y_theta||^2 / ||y||^2, of
    its output y on calibration text, is at most this."""
    align: bool = False
    """Before dReLU, turns the neurons whose up rows are mostly negative, up row and down column
    together: the dense model stays as it is, and dReLU keeps more of it."""
    tokens: int = 8192
    """Calibration tokens; only `max_error` and `align` need them."""

    def check(self) -> None:
        """At least one token, and an error strictly between 0 and 1."""
        at_least(1, self, "tokens")
        strictly_between_0_and_1(self, "max_error")

    def needs_text(self) -> bool:
        """Only where theta or signs are chosen."""
        return self.align or self.max_error is not None

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Swaps; no theta is chosen."""
        _check(self)
        swap_activations(model, _conversion(self, conversion_so_far(model, donor), {}))

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Swaps; returns what `swap` measured."""
        return swap(model, self, conversion_so_far(model, work.donor), self.text(work))


def swap(model: nn.Module, step: Swap, so_far: Conversion, blocks_BT: Blocks) -> dict[str, Any]:
    """Gives every FFN of a dense model another activation, in the model and in its config.

    Args:
        model: dense; split or not.
        step: which activation. With `max_error`, every FFN gets its own theta; with `align`, the
            signs of neurons are chosen first.
        so_far: what was done to the model before.
        blocks_BT: calibration text; only `max_error` and `align` need it.

    Returns:
        With `max_error`, for every FFN its theta and the error that it makes; with `align`, the
        share of its energy that dReLU keeps; else nothing.

    Raises:
        ValueError: an activation that is unknown or that an FFN cannot have, a `max_error` that
            the FFN's own theta already exceeds, an MoE expert that saw no token, or a routed model.
    """
    _check(step)
    if step.max_error is None:
        check_swap(model, conversion := _conversion(step, so_far, {}))
        aligned = {"kept": align_signs(model, blocks_BT)} if step.align else {}
        swap_activations(model, conversion)
        return aligned
    found = calibrate_thetas(model, step.max_error, blocks_BT)
    own = {name: {"kind": "fatrelu", "theta": choice.theta} for name, choice in found.items()}
    swap_activations(model, _conversion(step, so_far, own))
    return {"thetas": {name: choice._asdict() for name, choice in found.items()}}


def _check(step: Swap) -> None:
    kind = step.activation.get("kind")
    if step.align and kind != "drelu":
        raise ValueError(f"swap: align chooses signs for drelu; {kind} is the same with any")
    if step.max_error is None:
        return
    if kind != "fatrelu":
        raise ValueError(f"swap: max_error chooses theta, which {kind} has not: use fatrelu")
    if "theta" in step.activation:
        raise ValueError("swap: max_error chooses theta: give one of the two")


def _conversion(step: Swap, so_far: Conversion, own: dict[str, dict[str, Any]]) -> Conversion:
    return replace(so_far, activation=step.activation, activation_of=own)


class Theta(NamedTuple):
    """The threshold of one FFN."""

    theta: float
    error: float
    """||y - y_theta||^2 / ||y||^2 over the calibration text, y without the down projection's
    bias."""


def calibrate_thetas(model: nn.Module, max_error: float, blocks_BT: Blocks) -> dict[str, Theta]:
    """Name of every FFN -> the largest theta whose error is at most `max_error`.

    y is what the FFN computes now, from the inputs it has now: no other FFN is changed meanwhile.
    The error grows with theta from where the FFN's own is, so halving a range finds the largest,
    to 1 / 2^ROUNDS of the largest row on the text.

    Raises:
        ValueError: the FFN's own theta, 0 where it has none, already exceeds `max_error`, or an
            MoE expert that saw no token.
    """
    ffns = find_ffns(model)
    own = [ffn.act.theta if isinstance(ffn.act, FATReLU) else 0.0 for ffn in ffns]
    high = _largest_rows(model, ffns, blocks_BT)
    low = _tried(model, ffns, own, blocks_BT)
    for ffn, start in zip(ffns, low, strict=True):
        if start.error > max_error:
            raise ValueError(
                f"{ffn.name}: fatrelu with theta {start.theta:g} makes an error of "
                f"{start.error:.3g}, above the max_error of {max_error:g}: put `swap` to relu and "
                "`train` before it"
            )
    for _ in range(ROUNDS):
        middle = [(one.theta + other) / 2 for one, other in zip(low, high, strict=True)]
        for index, tried in enumerate(_tried(model, ffns, middle, blocks_BT)):
            if tried.error <= max_error:
                low[index] = tried
            else:
                high[index] = tried.theta
    return {ffn.name: choice for ffn, choice in zip(ffns, low, strict=True)}


def _largest_rows(model: nn.Module, ffns: Sequence[FFN], blocks_BT: Blocks) -> list[float]:
    """The largest number that enters each activation: at this theta the FFN is off."""
    largest = [0.0] * len(ffns)

    def visit(index: int, x_TD: Tensor, _: Tensor) -> None:
        up_TF, gate_TF = ffns[index].projections.rows_TF(x_TD)
        row_TF = up_TF if gate_TF is None else gate_TF
        largest[index] = max(largest[index], float(row_TF.max()))

    visit_activations(model, blocks_BT, visit, title="find the range of theta")
    return largest


@torch.no_grad()
def _tried(
    model: nn.Module, ffns: Sequence[FFN], thetas: Sequence[float], blocks_BT: Blocks
) -> list[Theta]:
    """The error of every FFN at its theta."""
    lost, whole = [0.0] * len(ffns), [0.0] * len(ffns)

    def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
        parts = ffns[index].projections
        down_FD = parts.weights().down_FD.float()
        cut_TF = hidden_TF(FATReLU(thetas[index]), *parts.rows_TF(x_TD))
        whole[index] += float((h_TF.float() @ down_FD).square().sum())
        lost[index] += float(((h_TF.float() - cut_TF.float()) @ down_FD).square().sum())

    visit_activations(model, blocks_BT, visit, title="calibrate theta")
    return [
        Theta(theta, off / (all_of_it or 1.0))
        for theta, off, all_of_it in zip(thetas, lost, whole, strict=True)
    ]
