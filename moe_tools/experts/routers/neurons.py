"""Routers that run neurons of the FFN itself.

Letters: T tokens, D model width, F neurons, R experts that are routed, N neurons of one expert, X
dimensions of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_tools.experts.importance import Importance
from moe_tools.experts.profiles import Sketch, marks_TF
from moe_tools.experts.routers.base import Router, RowReader, Scoring, Start, Starter
from moe_tools.hosts.ffn import FFN
from moe_tools.kernels.few_bits import bits_each


class RepresentativeRouter(RowReader):
    """|h| of one neuron of each expert, the one most like the rest (CMoE, arXiv 2502.04416).

    The neuron is named by its index; its rows are read from the FFN, so that training the FFN
    trains the router.
    """

    neurons: Tensor

    def __init__(self, ffn: FFN, importance: Importance) -> None:
        """The first neuron of each expert, until `represent` names better ones."""
        super().__init__(ffn, importance)
        first_E = torch.tensor(importance.division.sizes).cumsum(0).roll(1)
        first_E[0] = 0
        self.register_buffer("neurons", first_E[importance.shared :])

    @classmethod
    def starter(cls, start: Start, sparsity: float) -> Callable[[Importance], Starter] | None:
        """Calibration text names the neurons, however other kinds start."""
        return Representatives

    def represent(self, neurons_R: Tensor) -> None:
        """Names the neuron of each expert."""
        self.neurons.copy_(neurons_R)

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or more."""
        return self.projections.hidden_TK(x_TD, self.neurons).float().abs()

    def flops(self) -> int:
        """The rows of these neurons; a kernel runs no others to score."""
        return 2 * len(self.neurons) * self.projections.weights().row_numbers

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """The same rows, which are known where the expert is chosen."""
        row = self.projections.weights().row_numbers
        bits = row * bits_each(weight_bits)
        return Scoring(self.flops(), len(self.neurons) * bits, 0.0, 2 * row, bits, "expert")


class Representatives(Starter):
    """Finds the neuron of each expert whose marks are nearest to the expert's mean (CMoE)."""

    def __init__(self, importance: Importance) -> None:
        self.importance = importance
        neurons, device = importance.division.neurons, importance.down_FD.device
        self.marks = Sketch(neurons, device, seed=0)

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        """Sketches which tokens mark each neuron."""
        self.marks.add(marks_TF(h_TF))

    def apply(self, router: Router) -> None:
        """Names the neurons."""
        assert isinstance(router, RepresentativeRouter)
        router.represent(representatives_R(self.marks.rows(), self.importance))


def representatives_R(rows_FX: Tensor, importance: Importance) -> Tensor:
    """The neuron of each routed expert whose row is nearest to the mean row of the expert."""
    chosen, start = [], 0
    for size in importance.division.sizes:
        rows_NX = rows_FX[start : start + size]
        chosen.append(start + int((rows_NX - rows_NX.mean(0)).norm(dim=1).argmin()))
        start += size
    return torch.tensor(chosen[importance.shared :], device=rows_FX.device)


class OracleRouter(RowReader):
    """The norm of each expert's own output: the upper bound of every router.

    It runs the whole FFN to decide what to run of it, so it saves nothing; it tells what a split
    is worth, and how far a router falls short.
    """

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or more."""
        down_FD = self.projections.computed().down_FD
        importance = Importance(self.division, self.shared, down_FD)
        return importance.norm_TR(self.projections.hidden_TF(x_TD))

    def flops(self) -> int:
        """Every neuron's rows."""
        return 2 * self.division.neurons * self.projections.weights().row_numbers

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """The same rows, which are then known."""
        row = self.projections.weights().row_numbers
        bits = row * bits_each(weight_bits)
        return Scoring(self.flops(), self.division.neurons * bits, 0.0, 2 * row, bits)
