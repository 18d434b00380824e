"""Whether and how much each expert adds to the output on each token: what routers predict.

Letters: T tokens, D model width, F neurons, E experts, R experts that are routed (all but the
shared ones, which come first), N neurons of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_tools.experts.division import Division

LEAST_ENERGY = 1e-12
"""Energies below are one: a neuron that is exactly 0 has no logarithm."""


@dataclass(frozen=True)
class Importance:
    """The experts of one FFN, and four answers to "how much"."""

    division: Division
    shared: int
    """Experts that always run: no router scores them."""
    down_FD: Tensor
    """W_down transposed."""
    off_F: Tensor | None = None
    """What a neuron contributes to h when its expert is off; None means zero."""

    @property
    def routed(self) -> int:
        """R."""
        return self.division.num_experts - self.shared

    @property
    def routed_neurons(self) -> int:
        """Neurons that a router can turn off."""
        return sum(self.division.sizes[self.shared :])

    def magnitude_TR(self, h_TF: Tensor) -> Tensor:
        """sum over an expert's neurons of |h - off|.

        MoEfication's score (arXiv 2110.01786): for ReLU and off = 0 the sum of its activations;
        with a mean, that of G-MoEfication for any activation.
        """
        return self._routed(self.division.sum_TE(self._moved_TF(h_TF).abs()))

    def nonzero_TR(self, h_TF: Tensor, zero_below: float = 0.0) -> Tensor:
        """Whether any neuron of an expert is non-zero: what a neuron predictor predicts.

        A neuron is non-zero when |h - off| is more than `zero_below` times the token's largest: at
        0, exactly as ReLU leaves it; other activations have no exact zeros and need more.
        """
        moved_TF = self._moved_TF(h_TF).abs()
        nonzero_TF = moved_TF > zero_below * moved_TF.amax(-1, keepdim=True)
        return self._routed(self.division.reduce(nonzero_TF, lambda piece_TEN: piece_TEN.any(-1)))

    def log_energy_TR(self, h_TF: Tensor) -> Tensor:
        """log sum over an expert's neurons of ((h - off) ||w_down||)^2.

        The square root of the energy bounds how far the expert moves the output, up to the square
        root of its size.
        """
        energy_TF = (self._moved_TF(h_TF) * self.down_FD.float().norm(dim=1)).square()
        return self._routed(self.division.sum_TE(energy_TF)).clamp_min(LEAST_ENERGY).log()

    def norm_TR(self, h_TF: Tensor) -> Tensor:
        """||E_e(x)||: how far the expert moves the output, exactly (D2DMoE, arXiv 2310.04361).

        ||W h||^2 = h^T (W^T W) h, so that no (T, E, D) tensor is made.
        """
        moved, down_DF = self._moved_TF(h_TF), self.down_FD.float().T
        pairs = zip(self.division.pieces(moved), self.division.pieces(down_DF), strict=True)
        squares = [_squared_norm_TE(h_TEN, down_DEN) for h_TEN, down_DEN in pairs]
        return self._routed(torch.cat(squares, dim=-1)).clamp_min(0).sqrt()

    def _moved_TF(self, h_TF: Tensor) -> Tensor:
        return h_TF.float() if self.off_F is None else h_TF.float() - self.off_F.float()

    def _routed(self, values_TE: Tensor) -> Tensor:
        return values_TE[..., self.shared :]


def _squared_norm_TE(h_TEN: Tensor, down_DEN: Tensor) -> Tensor:
    gram_ENN = torch.einsum("den,dem->enm", down_DEN, down_DEN)
    return (torch.einsum("...en,enm->...em", h_TEN, gram_ENN) * h_TEN).sum(-1)
