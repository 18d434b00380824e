"""Neuron predictors without training: the pre-activations that decide, from fewer bits.

They read the FFN's own rows whenever they score, so that they never grow stale and add nothing to
a checkpoint. Here the few bits are emulated in fp32; a kernel would keep a packed copy of the rows,
which is what `scoring` speaks of.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce

import torch
from torch import Tensor, nn

from moe_tools.experts.routers.base import RowReader, Scoring, in_fp32
from moe_tools.hosts.firing import DecidingRows, firing_rows

WORD = 32
"""Sign bits that are compared at once."""
LEVELS = 127
"""Levels of int8 on either side of 0."""
ROUNDING = 2.0**-15
"""What fp32 may add to the error of int8 for each product, as a share of the bound: a sum of D
products is off by at most D 2^-24 sum |w x|, and sum |w x| is at most 127 s_w ||x||_1, 254 times
its part of the bound. That is D 2^-16, once in the host and once here."""


class FiringRouter(RowReader):
    """A neuron scores as its weakest deciding pre-activation, an expert as its best neuron.

    A score of 1/2 is an estimate of 0: `Threshold(0.5)` runs what is expected to fire, a lower tau
    is a margin. Scores have no gradient.
    """

    @torch.no_grad()
    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or more."""
        with in_fp32(x_TD):
            deciding = firing_rows(self.projections)
            scores_TF = reduce(torch.minimum, [self.score_TF(x_TD.float(), r) for r in deciding])
        scores_TE = self.division.reduce(scores_TF, lambda piece_TEN: piece_TEN.amax(-1))
        return scores_TE[..., self.shared :]

    def flops(self) -> int:
        """None: its products are of whole numbers, see `scoring`."""
        return 0

    @abstractmethod
    def score_TF(self, x_TD: Tensor, rows: DecidingRows) -> Tensor:
        """How far each pre-activation is expected above 0; 1/2: at 0."""


class SignRouter(FiringRouter):
    """The share of the products w_i x_i that are not negative, by sign bits alone (SparseInfer).

    arXiv 2411.12692: a neuron is off if N_neg > alpha N_pos, alpha >= 1 being a margin, 0 counting
    as positive. That is `Threshold(tau)` with tau just below 1 / (1 + alpha). Ours: a bias is one
    more product, with 1. The threshold of a FATReLU has no sign bits: it is taken for 0.
    """

    def score_TF(self, x_TD: Tensor, rows: DecidingRows) -> Tensor:
        """N_pos / (N_pos + N_neg), in [0, 1]."""
        bias_F = None if rows.bias_F is None else _signs(rows.bias_F)
        sum_TF = nn.functional.linear(_signs(x_TD), _signs(rows.rows_FD), bias_F)
        products = x_TD.shape[-1] + (bias_F is not None)
        return (sum_TF / products + 1) / 2

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """A word of signs is one XOR, one population count and one addition: 4 for 32 products.

        Read from memory: a bit a weight, in whole words.
        """
        words = sum(
            len(rows.rows_FD) * -(-rows.rows_FD.shape[1] // WORD)
            for rows in firing_rows(self.projections)
        )
        return Scoring(0.0, WORD * words, few_bit_ops=4 * words)


class Int8GateRouter(FiringRouter):
    """Where the pre-activation's interval lies: its int8 estimate, and a bound of the error.

    Rows and tokens are quantised to int8, each by its own largest magnitude: w = s_w q_w, x = s_x
    q_x. The estimate misses by at most s_x ||w'||_1 / 2 + s_w ||x||_1 / 2, which follows from
    w x - w' x' = w' (x - x') + (w - w') x for w' = s_w q_w and x' = s_x q_x. The score is where 0
    lies between estimate + bound and estimate - bound: 0 if the neuron cannot fire, 1/2 where the
    estimate is 0, 1 and more if it fires for certain.

    So `Threshold(0)` misses no neuron that fires, if the host sums in fp32: the bound is widened to
    cover what rounding does. tau between 0 and 1/2 takes a part of the margin, and some misses.
    """

    def score_TF(self, x_TD: Tensor, rows: DecidingRows) -> Tensor:
        """(estimate + bound) / (2 bound), 0 or more."""
        w_FD = rows.rows_FD.float()
        q_TD, scale_T1 = _int8(x_TD)
        q_FD, scale_F1 = _int8(w_FD)
        estimate_TF = nn.functional.linear(q_TD, q_FD) * scale_T1 * scale_F1.T
        if rows.bias_F is not None:
            estimate_TF = estimate_TF + rows.bias_F.float()
        estimate_TF = estimate_TF - rows.threshold
        l1_F = q_FD.abs().sum(1) * scale_F1.squeeze(1)
        bound_TF = (scale_T1 * l1_F + x_TD.abs().sum(-1, keepdim=True) * scale_F1.T) / 2
        bound_TF = (bound_TF * (1 + (x_TD.shape[-1] + 4) * ROUNDING)).clamp_min(1e-12)
        return ((estimate_TF + bound_TF) / (2 * bound_TF)).clamp_min(0)

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """An int8 multiply and add for each weight of the deciding rows.

        Read from memory: a byte a weight, and for each row its scale and its L1 norm in bf16.
        """
        deciding = firing_rows(self.projections)
        weights = sum(rows.rows_FD.numel() for rows in deciding)
        vectors = 2 * sum(len(rows.rows_FD) for rows in deciding)
        return Scoring(0.0, 8 * weights + 16 * vectors, few_bit_ops=2 * weights)


def _signs(values: Tensor) -> Tensor:
    """1 or -1; 0 is positive."""
    return torch.where(values < 0, -1.0, 1.0)


def _int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-127, 127], in fp32, and the scale of each row."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / LEVELS
    return (values / scale).round(), scale
