"""Routers made from the experts' own rows. Letters: T tokens, D width, F neurons, R routed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import Router, in_fp32, matrix_flops
from moe_tools.hosts.ffn import FFN


def mean_rows_RD(rows_FD: Tensor, importance: Importance) -> Tensor:
    """The mean row of each routed expert, in fp32."""
    division = importance.division
    sizes_E = torch.tensor(division.sizes, device=rows_FD.device)
    sums_DE = division.sum_TE(rows_FD.detach().float().T)
    return (sums_DE / sizes_E).T[importance.shared :].contiguous()


class SimilarityRouter(Router):
    """-||x - mean row||, the router of MoEfication that needs no training (arXiv 2110.01786)."""

    ratio_scale = False
    rows: Tensor

    def __init__(self, rows_RD: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows_RD)

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """From the rows that decide when a neuron fires: gate rows when gated."""
        return cls(mean_rows_RD(ffn.weights().routing_FD, importance), **options)

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or less."""
        with in_fp32(x_TD):
            flat_TD = x_TD.float().reshape(-1, x_TD.shape[-1])
            distance_TR = torch.cdist(flat_TD, self.rows.float())
            return -distance_TR.reshape(*x_TD.shape[:-1], len(self.rows))

    def flops(self) -> int:
        """The product of x and the rows."""
        return matrix_flops(self.rows)


class MeanGateRouter(Router):
    """act(mean gate row x): what the average neuron of the expert does (arXiv 2602.15521).

    An FFN without a gate has only the rows of its up projection. Negative values of SiLU and GELU
    count as 0.
    """

    rows: Tensor
    offset: Tensor

    def __init__(self, rows_RD: Tensor, offset_R: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.register_buffer("rows", rows_RD)
        self.register_buffer("offset", offset_R)
        self.act = act

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """From the mean gate row of each expert (ExpertWeaver)."""
        weights = ffn.weights()
        rows_RD = mean_rows_RD(weights.routing_FD, importance)
        bias_F = weights.up_F if weights.gate_FD is None else weights.gate_F
        if bias_F is None:
            offset_R = rows_RD.new_zeros(len(rows_RD))
        else:
            offset_R = mean_rows_RD(bias_F[:, None], importance).squeeze(1)
        return cls(rows_RD, offset_R, ffn.act, **options)

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or more."""
        with in_fp32(x_TD):
            gate_TR = nn.functional.linear(x_TD.float(), self.rows.float(), self.offset.float())
            return self.act(gate_TR).clamp_min(0)

    def flops(self) -> int:
        """The product of x and the rows."""
        return matrix_flops(self.rows)
