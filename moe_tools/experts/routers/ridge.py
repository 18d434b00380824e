"""Linear routers, and their start. Letters: T tokens, D width, R experts that are routed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import ProductFP32, Router, Start, Starter, matrix_flops
from moe_tools.hosts.ffn import FFN

RIDGE = 1e-2
"""Ridge penalty, as a share of the mean squared input."""


class RidgeRouter(Router, ProductFP32):
    """Scores of the logits W x + b; see `RidgeStart`."""

    bias: nn.Parameter | None
    spread: float
    """Standard deviation of the started logits."""

    def set_spread(self, spread: float) -> None:
        """Takes the spread of a start.

        Raises:
            ValueError: no number above 0.
        """
        if isinstance(spread, bool) or not 0 < spread < float("inf"):
            raise ValueError(f"a linear router needs a spread above 0, not {spread!r}")
        self.spread = spread

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return self.bias

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """Knows nothing; the options are those of the class after `routed`."""
        return cls(ffn.width, importance.routed, **options)

    @classmethod
    def starter(cls, start: Start, sparsity: float) -> Callable[[Importance], Starter] | None:
        """The closed form, or nothing: as it is built."""
        return partial(RidgeStart, sparsity=sparsity) if start == "regression" else None

    def flops(self) -> int:
        return matrix_flops(self.weight)


class RidgeStart(Starter):
    """Fits a linear router in closed form to log energy (`Importance.log_energy_TR`).

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
        """Solves and scales: logits of the router's spread, `sparsity` of them below zero.

        The predictions are treated as normal: their mean and variance over tokens and experts
        follow from the sums, without a second pass. Without a bias, how far an expert is above the
        mean of a token's experts is regressed, on the inputs alone: what all experts of a token
        have in common decides nothing among them, and half of the logits are below zero.
        """
        assert isinstance(router, RidgeRouter)
        solution_DR, moment_DD = self.solve(constant=router.bias is not None)
        second_R = (solution_DR * (moment_DD @ solution_DR)).sum(0)
        if router.bias is None:  # the mean over experts is 0 for every token
            router.weight.copy_(solution_DR.T * logit_scale(router.spread, second_R.mean()))
            return
        mean = (moment_DD[-1] @ solution_DR).mean()
        scale = logit_scale(router.spread, second_R.mean() - mean.square())
        router.weight.copy_(solution_DR[:-1].T * scale)
        router.bias.copy_((solution_DR[-1] - mean) * scale + self.line(router.spread))

    def line(self, spread: float) -> Tensor:
        """What is added to normal logits of mean 0, that `sparsity` of them are below zero."""
        return -spread * torch.special.ndtri(torch.tensor(self.sparsity, dtype=torch.double))

    def solve(self, *, constant: bool) -> tuple[Tensor, Tensor]:
        """The ridge's solution, (inputs, R), and the inputs' second moments, both in fp64.

        With a constant, it is the last of the inputs, and has no penalty. Without one, how far an
        expert is above the mean of a token's experts is regressed.
        """
        kept = slice(None if constant else -1)
        inputs_DD, targets_DR = self.inputs_DD[kept, kept], self.targets_DR[kept]
        if not constant:
            targets_DR = targets_DR - targets_DR.mean(1, keepdim=True)
        penalty_D = torch.full_like(
            inputs_DD[0], float(RIDGE * self.inputs_DD.diagonal()[:-1].mean())
        )
        if constant:
            penalty_D[-1] = 0.0
        solution_DR = torch.linalg.solve(
            (inputs_DD + penalty_D.diag()).double(), targets_DR.double()
        )
        return solution_DR, inputs_DD.double() / self.tokens


def logit_scale(spread: float, variance: Tensor) -> Tensor:
    """What gives predictions of a variance the spread of a router."""
    return spread / variance.clamp_min(1e-12).sqrt()
