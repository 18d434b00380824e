"""Attach: a router on every FFN, started from the donor's own activations.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.data import Blocks
from moe_tools.experts.conversion import Conversion, attach_experts, conversion_so_far
from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import ROUTERS
from moe_tools.experts.routers.base import Start, Starter
from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.rules import at_least, strictly_between_0_and_1
from moe_tools.steps.step import Step, Work


@dataclass(frozen=True)
class Attach(Step):
    """A router on every FFN."""

    verb = "attach"
    changes_function = True

    router: str = "sigmoid"
    router_options: dict[str, Any] = field(default_factory=dict)
    """What the kind of router takes, e.g. `hidden` of a norm router."""
    selector: dict[str, Any] = field(default_factory=lambda: {"kind": "threshold", "tau": 0.5})
    start: Start = "regression"
    """How sigmoid and bottleneck routers begin: by ridge regression on the donor's activations, or
    all on."""
    start_sparsity: float = 0.02
    """Share of experts off after the regression, in every layer."""
    when_off: Literal["zero", "mean"] = "zero"
    """What an expert that is off contributes: nothing, or its neurons' calibrated mean."""
    mode: Literal["hard", "weighted"] = "hard"
    """Experts that are selected run as they are, or times what their scores are to each other; see
    `moe_tools.experts.experts.Mode`. A `train` step has a mode of its own."""
    tokens: int = 16384
    """Calibration tokens."""

    def check(self) -> None:
        """At least one token, and a share strictly between 0 and 1."""
        at_least(1, self, "tokens")
        strictly_between_0_and_1(self, "start_sparsity")

    def needs_text(self) -> bool:
        """Where the router is started from activations, or means are added for what is off."""
        return self.starter() is not None or self.when_off == "mean"

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Attaches routers that know nothing."""
        for ffn in attach_experts(model, self.conversion(conversion_so_far(model, donor))):
            _check_zeros(ffn, self.router)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Attaches and starts the routers; measures nothing."""
        attach(model, self, conversion_so_far(model, work.donor), self.text(work))
        return {}

    def conversion(self, split: Conversion) -> Conversion:
        """What a model's config says after the step.

        Raises:
            ValueError: no split was made.
        """
        if split.expert_size is None:
            raise ValueError("attach needs experts: put `split` before it in the recipe")
        return replace(
            split,
            router=self.router,
            router_options=self.router_options,
            selector=self.selector,
            when_off=self.when_off,
            mode=self.mode,
        )

    def starter(self) -> Callable[[Importance], Starter] | None:
        """What starts the routers, see `Router.starter`."""
        return ROUTERS[self.router].starter(self.start, self.start_sparsity)


def attach(model: nn.Module, step: Attach, split: Conversion, blocks_BT: Blocks) -> None:
    """Grafts routed FFNs onto a dense model in place, onto the experts that a split made.

    Routers are started from activations where their kind can be (`Router.starter`).

    Raises:
        ValueError: no split was made, an unknown router or selector, a predictor of zeros where
            there are none, or an MoE expert that saw no token.
    """
    conversion = step.conversion(split)
    watchers = [_watchers(ffn, step, conversion) for ffn in find_ffns(model)]
    if step.needs_text():

        def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
            for watcher in watchers[index]:
                watcher.add(x_TD, h_TF)

        visit_activations(model, blocks_BT, visit, title="calibrate routers")
    for ffn, seen in zip(attach_experts(model, conversion), watchers, strict=True):
        _check_zeros(ffn, step.router)
        for watcher in seen:
            watcher.apply(ffn)


def _check_zeros(ffn: ExpertFFN, router: str) -> None:
    act = ffn.projections.act
    if ffn.router.needs_zeros and not gives_zeros(act):
        raise ValueError(
            f"router {router} predicts which neurons are exactly 0, and {type(act).__name__} of "
            f"{ffn.name} leaves none: put `swap: {{activation: {{kind: relu}}}}` and `train` "
            "before it, or say in router_options from which share of the largest a neuron counts: "
            "{zero_below: 0.05}"
        )


def _watchers(ffn: FFN, step: Attach, conversion: Conversion) -> list[_Starting | _Means]:
    """What has to see the activations of an FFN before it is replaced."""
    down_FD = ffn.weights().down_FD
    division = conversion.divide(len(down_FD), ffn.name)
    importance = Importance(division, conversion.shared_experts, down_FD)
    starter = step.starter()
    found: list[_Starting | _Means] = []
    if starter is not None:
        found.append(_Starting(starter(importance)))
    if step.when_off == "mean":
        found.append(_Means(importance))
    return found


class _Starting:
    """Starts the router of one FFN."""

    def __init__(self, starter: Starter) -> None:
        self.starter = starter

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        self.starter.add(x_TD, h_TF)

    def apply(self, ffn: ExpertFFN) -> None:
        self.starter.apply(ffn.router)


class _Means:
    """The mean of every neuron of one FFN, for experts that are off."""

    def __init__(self, importance: Importance) -> None:
        self.h_F = importance.down_FD.new_zeros(importance.division.neurons, dtype=torch.float32)
        self.tokens = 0

    def add(self, _: Tensor, h_TF: Tensor) -> None:
        self.h_F += h_TF.float().sum(0)
        self.tokens += len(h_TF)

    def apply(self, ffn: ExpertFFN) -> None:
        assert ffn.off_F is not None
        ffn.off_F.copy_(self.h_F / self.tokens)
