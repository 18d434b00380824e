"""Attach: a router on every FFN, started from the donor's own activations.

Letters: T tokens, D model width, F neurons, R experts that are routed, X dimensions of a sketch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import ROUTERS, RepresentativeRouter, SigmoidRouter
from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.recipe import Attach
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.profiles import Sketch, marks_TF

RIDGE = 1e-2
"""Ridge penalty, as a share of the mean squared input."""
SPREAD = 2.0
"""Standard deviation of the started logits: most scores clear of tau, none saturated."""


def attach(model: nn.Module, step: Attach, split: Conversion, blocks_BT: Tensor) -> None:
    """Grafts routed FFNs onto a dense model in place, onto the experts that a split made.

    Start `regression` fits each sigmoid router in closed form to log energy and shifts it so that
    `start_sparsity` of the experts are off, in every FFN. The fit needs no gradient step: it is
    the normal equations of a ridge regression, accumulated over batches.

    Raises:
        ValueError: no split was made, an unknown router or selector, or an MoE expert that saw no
            token.
    """
    conversion = _conversion(step, split)
    watchers = [_watchers(ffn, step, conversion) for ffn in find_ffns(model)]
    if attach_needs_text(step):

        def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
            for watcher in watchers[index]:
                watcher.add(x_TD, h_TF)

        visit_activations(model, blocks_BT, visit, title="calibrate routers")
    for ffn, seen in zip(attach_experts(model, conversion), watchers, strict=True):
        for watcher in seen:
            watcher.apply(ffn)


def attach_needs_text(step: Attach) -> bool:
    """Whether the step looks at activations."""
    return _regresses(step) or _represents(step) or step.when_off == "mean"


def _regresses(step: Attach) -> bool:
    return ROUTERS[step.router] is SigmoidRouter and step.start == "regression"


def _represents(step: Attach) -> bool:
    return ROUTERS[step.router] is RepresentativeRouter


def rehearse_attach(model: nn.Module, step: Attach, split: Conversion) -> None:
    """`attach` without text: routers that know nothing, and every error that words can make.

    Raises:
        ValueError: as `attach`.
    """
    attach_experts(model, _conversion(step, split))


def _conversion(step: Attach, split: Conversion) -> Conversion:
    if split.expert_size is None:
        raise ValueError("attach needs experts: put `split` before it in the recipe")
    return replace(
        split,
        router=step.router,
        router_options=step.router_options,
        selector=step.selector,
        when_off=step.when_off,
    )


class _Watcher(Protocol):
    """Sees the activations of one dense FFN, then starts what took its place."""

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None: ...

    def apply(self, ffn: ExpertFFN) -> None: ...


def _watchers(ffn: FFN, step: Attach, conversion: Conversion) -> list[_Watcher]:
    down_FD = ffn.weights().down_FD
    division = conversion.divide(len(down_FD), ffn.name)
    importance = Importance(division, conversion.shared_experts, down_FD)
    found: list[_Watcher] = []
    if _regresses(step):
        found.append(_Regression(importance, step.start_sparsity))
    if _represents(step):
        found.append(_Representatives(importance))
    if step.when_off == "mean":
        found.append(_Means(importance))
    return found


class _Means:
    """The mean of every neuron."""

    def __init__(self, importance: Importance) -> None:
        self.h_F = importance.down_FD.new_zeros(importance.division.neurons, dtype=torch.float32)
        self.tokens = 0

    def add(self, _: Tensor, h_TF: Tensor) -> None:
        self.h_F += h_TF.float().sum(0)
        self.tokens += len(h_TF)

    def apply(self, ffn: ExpertFFN) -> None:
        assert ffn.off_F is not None
        ffn.off_F.copy_(self.h_F / self.tokens)


class _Representatives:
    """The neuron of each expert whose marks are nearest to the expert's mean (CMoE)."""

    def __init__(self, importance: Importance) -> None:
        self.importance = importance
        neurons, device = importance.division.neurons, importance.down_FD.device
        self.marks = Sketch(neurons, device, seed=0)

    def add(self, _: Tensor, h_TF: Tensor) -> None:
        self.marks.add(marks_TF(h_TF))

    def apply(self, ffn: ExpertFFN) -> None:
        assert isinstance(ffn.router, RepresentativeRouter)
        ffn.router.represent(representatives_R(self.marks.rows(), self.importance))


def representatives_R(rows_FX: Tensor, importance: Importance) -> Tensor:
    """The neuron of each routed expert whose row is nearest to the mean row of the expert."""
    chosen, start = [], 0
    for size in importance.division.sizes:
        rows_NX = rows_FX[start : start + size]
        chosen.append(start + int((rows_NX - rows_NX.mean(0)).norm(dim=1).argmin()))
        start += size
    return torch.tensor(chosen[importance.shared :], device=rows_FX.device)


class _Regression:
    """The sums of one FFN's ridge regression, inputs standing with a constant 1."""

    def __init__(self, importance: Importance, start_sparsity: float) -> None:
        width = importance.down_FD.shape[1] + 1
        like = importance.down_FD
        self.importance = importance
        self.start_sparsity = start_sparsity
        self.inputs_DD = like.new_zeros(width, width, dtype=torch.float32)
        self.targets_DR = like.new_zeros(width, importance.routed, dtype=torch.float32)
        self.tokens = 0

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        x_TD = nn.functional.pad(x_TD.float(), (0, 1), value=1.0)
        self.inputs_DD += x_TD.T @ x_TD
        self.targets_DR += x_TD.T @ self.importance.log_energy_TR(h_TF)
        self.tokens += len(x_TD)

    @torch.no_grad()
    def apply(self, ffn: ExpertFFN) -> None:
        """Solves and scales: logits of spread `SPREAD`, `start_sparsity` of them below zero.

        The predictions are treated as normal: their mean and variance over tokens and experts
        follow from the sums, without a second pass.
        """
        penalty = RIDGE * self.inputs_DD.diagonal()[:-1].mean()
        ridge_DD = penalty * torch.eye(len(self.inputs_DD), device=self.inputs_DD.device)
        ridge_DD[-1, -1] = 0.0
        solution_DR = torch.linalg.solve(
            (self.inputs_DD + ridge_DD).double(), self.targets_DR.double()
        )
        inputs_DD = self.inputs_DD.double() / self.tokens
        mean_R = inputs_DD[-1] @ solution_DR
        second_R = (solution_DR * (inputs_DD @ solution_DR)).sum(0)
        mean = mean_R.mean()
        deviation = (second_R.mean() - mean.square()).clamp_min(1e-12).sqrt()
        below = torch.special.ndtri(torch.tensor(self.start_sparsity, dtype=torch.double))
        scale = SPREAD / deviation
        ffn.router.get_parameter("weight").copy_(solution_DR[:-1].T * scale)
        ffn.router.get_parameter("bias").copy_((solution_DR[-1] - mean) * scale - SPREAD * below)
