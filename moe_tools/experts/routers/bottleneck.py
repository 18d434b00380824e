"""A linear router of few numbers: two matrices with a narrow middle and nothing between them.

A linear router over single neurons is as large as one of the FFN's own three matrices. Of what it
predicts, few directions matter: at rank 48, a thirtieth of the FFN of SmolLM2, and with the same
FLOPs in all, it leaves less error of the output than a full router over experts of 4 (LOG.md,
2026-11-30). WIDE routes groups so; the start in closed form is ours.

Letters: T tokens, D width, R experts that are routed, K units between the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import (
    LabelRouter,
    LinearFP32,
    ProductFP32,
    Router,
    Start,
    Starter,
    matrix_flops,
)
from moe_tools.experts.routers.ridge import RidgeStart, logit_scale
from moe_tools.hosts.ffn import FFN

SPREAD = 2.0
"""Standard deviation of the started logits, as that of sigmoid routers."""
LEAST_VARIANCE = 1e-6
"""Of the largest: directions of the inputs that vary less were not seen, or are rounding."""


class BottleneckRouter(LabelRouter):
    """G = sigmoid(W_2 W_1 x + b), one independent score an expert: LTE's router at a low rank.

    Args:
        width: D.
        routed: R.
        rank: K; None: a twelfth of the width, in whole sixteens.
        spread: standard deviation of the logits after a start by regression.

    Raises:
        ValueError: a rank below 1, or a spread that is not above 0.
    """

    def __init__(
        self, width: int, routed: int, rank: int | None = None, spread: float = SPREAD
    ) -> None:
        super().__init__()
        rank = max(16, round(width / 192) * 16) if rank is None else rank
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a bottleneck router needs rank >= 1, not {rank!r}")
        if isinstance(spread, bool) or not 0 < spread < float("inf"):
            raise ValueError(f"a bottleneck router needs a spread above 0, not {spread!r}")
        self.spread = spread
        self.first = LinearFP32(width, rank, bias=False)
        self.second = LinearFP32(rank, routed)
        nn.init.zeros_(self.second.weight)  # every expert on, as a fresh sigmoid router
        nn.init.constant_(cast("nn.Parameter", self.second.bias), 3.0)

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """Knows nothing; the options are those of the class after `routed`."""
        return cls(ffn.width, importance.routed, **options)

    @classmethod
    def starter(cls, start: Start, sparsity: float) -> Callable[[Importance], Starter] | None:
        """The closed form, or nothing: as it is built."""
        return partial(BottleneckStart, sparsity=sparsity) if start == "regression" else None

    @property
    def last(self) -> ProductFP32:
        """The second matrix."""
        return self.second

    def enters_last_TK(self, x_TD: Tensor) -> Tensor:
        """What the first matrix leaves."""
        return self.first(x_TD)

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return self.second.bias

    def flops(self) -> int:
        return matrix_flops(self.first.weight, self.second.weight)


class BottleneckStart(RidgeStart):
    """Reduced-rank regression: of all maps of rank K, the one nearest to the ridge's predictions.

    With S the covariance of the inputs and W the ridge's solution, it is W projected on the K
    leading left singular vectors of S^(1/2) W (Izenman 1975, J. Multivariate Analysis 5). What is
    between the matrices then has mean 0 over the text, up to a bias, and covariance I.
    """

    @torch.no_grad()
    def apply(self, router: Router) -> None:
        """Solves and scales, as `RidgeStart` does; what a rank has beyond the map's own is 0."""
        assert isinstance(router, BottleneckRouter)
        solution_DR, moment_DD = self.solve(constant=True)
        weight_DR, mean_D = solution_DR[:-1], moment_DD[-1, :-1]
        rank = min(len(router.first.weight), *weight_DR.shape)
        covariance_DD = moment_DD[:-1, :-1] - mean_D.outer(mean_D)
        variance_D, axes_DD = torch.linalg.eigh(covariance_DD)
        seen_D = variance_D > LEAST_VARIANCE * variance_D[-1]  # few tokens span no more
        root_D = torch.where(seen_D, variance_D.clamp_min(0).sqrt(), 0.0)
        whitened_DR = root_D[:, None] * (axes_DD.T @ weight_DR)
        lead_DK = torch.linalg.eigh(whitened_DR @ whitened_DR.T).eigenvectors[:, -rank:]
        first_DK = axes_DD @ (torch.where(seen_D, 1 / root_D, 0.0)[:, None] * lead_DK)
        second_KR = lead_DK.T @ whitened_DR
        mean_R = solution_DR[-1] + mean_D @ weight_DR
        mean = mean_R.mean()
        variance = (second_KR.square().sum(0) + mean_R.square()).mean() - mean.square()
        scale = logit_scale(router.spread, variance)
        constant_R = mean_R - (mean_D @ first_DK) @ second_KR
        router.first.weight.zero_()[:rank] = first_DK.T
        router.second.weight.zero_()[:, :rank] = second_KR.T * scale
        cast("nn.Parameter", router.second.bias).copy_(
            (constant_R - mean) * scale + self.line(router.spread)
        )
