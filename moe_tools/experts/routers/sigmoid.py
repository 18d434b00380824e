"""LTE's router, and its start. Letters: T tokens, D width, F neurons, R experts that are routed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import (
    LabelRouter,
    ProductFP32,
    Router,
    Start,
    Starter,
    matrix_flops,
)
from moe_tools.hosts.ffn import FFN

RIDGE = 1e-2
"""Ridge penalty, as a share of the mean squared input."""
SPREAD = 2.0
"""Standard deviation of the started logits: most scores clear of tau, none saturated."""


class SigmoidRouter(LabelRouter, ProductFP32):
    """G = sigmoid(W x + b), one independent score an expert (LTE, arXiv 2402.06126).

    The bias is ours: with it training starts from "every expert on" (G near 1).
    """

    bias: nn.Parameter

    def __init__(self, width: int, routed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(routed, width))
        self.bias = nn.Parameter(torch.full((routed,), 3.0))

    @property
    def logit_bias(self) -> nn.Parameter:
        return self.bias

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """Every expert on, for every token."""
        return cls(ffn.width, importance.routed, **options)

    @classmethod
    def starter(cls, start: Start, sparsity: float) -> Callable[[Importance], Starter] | None:
        """The closed form, or nothing: every expert on."""
        return partial(RidgeStart, sparsity=sparsity) if start == "regression" else None

    def flops(self) -> int:
        return matrix_flops(self.weight)

    @property
    def last(self) -> ProductFP32:
        """The router itself."""
        return self


class RidgeStart(Starter):
    """Fits a sigmoid router in closed form to log energy (`Importance.log_energy_TR`).

    Accumulates the normal equations of a ridge regression of one FFN, a constant 1 beside the
    inputs: no gradient step is needed.
    """

    def __init__(self, importance: Importance, sparsity: float) -> None:
        width = importance.down_FD.shape[1] + 1
        like = importance.down_FD
        self.importance = importance
        self.sparsity = sparsity
        self.inputs_DD = like.new_zeros(width, width, dtype=torch.float32)
        self.targets_DR = like.new_zeros(width, importance.routed, dtype=torch.float32)
        self.tokens = 0

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        """Adds a batch to the sums."""
        x_TD = nn.functional.pad(x_TD.float(), (0, 1), value=1.0)
        self.inputs_DD += x_TD.T @ x_TD
        self.targets_DR += x_TD.T @ self.importance.log_energy_TR(h_TF)
        self.tokens += len(x_TD)

    @torch.no_grad()
    def apply(self, router: Router) -> None:
        """Solves and scales: logits of spread `SPREAD`, `sparsity` of them below zero.

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
        below = torch.special.ndtri(torch.tensor(self.sparsity, dtype=torch.double))
        scale = SPREAD / deviation
        router.get_parameter("weight").copy_(solution_DR[:-1].T * scale)
        router.get_parameter("bias").copy_((solution_DR[-1] - mean) * scale - SPREAD * below)
