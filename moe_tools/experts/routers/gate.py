"""Runs the neurons whose gate is open: CATS (arXiv 2404.08763).

Letters: T tokens, R experts that are routed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import RowReader, Scoring, matrix_flops
from moe_tools.hosts.activations import JointActivation
from moe_tools.hosts.ffn import FFN
from moe_tools.kernels.few_bits import bits_each


class CATSRouter(RowReader):
    """|act(gate)| of single neurons, exactly; of larger experts the largest of them.

    The gate (without one, up) is computed whole, so a chosen neuron reads its other rows alone.
    """

    def __init__(self, ffn: FFN, importance: Importance) -> None:
        """Needs nothing.

        Raises:
            ValueError: an activation that joins gate and up in its own way has no act(gate).
        """
        super().__init__(ffn, importance)
        act = ffn.projections.act
        if isinstance(act, JointActivation):
            raise ValueError(
                f"{ffn.name}: router cats needs |act(gate)|, and {type(act).__name__} joins gate "
                "and up in its own way: use router few_bits"
            )

    @torch.no_grad()
    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or more."""
        up_TF, gate_TF = self.projections.rows_TF(x_TD)
        size_TF = self.projections.act(up_TF if gate_TF is None else gate_TF).float().abs()
        scores_TE = self.division.reduce(size_TF, lambda piece_TEN: piece_TEN.amax(-1))
        return scores_TE[..., self.shared :]

    def flops(self) -> int:
        """The deciding rows."""
        return matrix_flops(self.projections.weights().routing_FD)

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """Its rows, which are then known."""
        neurons, width = self.projections.size
        row = width * bits_each(weight_bits)
        return Scoring(self.flops(), neurons * row, known_flops=2 * width, known_bits=row)
