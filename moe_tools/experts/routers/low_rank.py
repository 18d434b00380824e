"""The learned neuron predictor. Letters: T tokens, D model width, F neurons, R routed experts."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import LabelRouter, LinearFP32, ProductFP32, matrix_flops
from moe_tools.hosts.ffn import FFN

ROWS = 4096
"""Tokens whose labels are summed at once."""


class LowRankRouter(LabelRouter):
    """sigmoid(W_2 relu(W_1 x) + b): how likely an expert is non-zero; made for single neurons.

    Two layers with few units between and binary cross entropy are Deja Vu's (arXiv 2310.17157,
    whose public code has no activation between the layers); the ReLU is that of PowerInfer (arXiv
    2312.12456) and ProSparse (arXiv 2402.13516). Ours: b starts at each neuron's own log-odds of
    firing, so that training begins at the frequencies and learns the difference.

    Args:
        width: D.
        routed: R.
        rank: units between the layers.
        zero_below: |h| of at most this share of the token's largest is a zero; 0: only exact
            zeros are, as ReLU makes them.
        positive_weight: what a non-zero neuron counts for in the loss, where a zero counts for 1;
            above 1 it trades precision for recall. Zeros dominate.
        bias: whether there is a b; PowerInfer's format has none.

    Raises:
        ValueError: a rank below 1, a share outside [0, 1), or a weight that is not positive.
    """

    target_dtype = torch.bool

    def __init__(
        self,
        width: int,
        routed: int,
        rank: int = 128,
        zero_below: float = 0.0,
        positive_weight: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"a low-rank router needs rank >= 1, not {rank!r}")
        if not 0 <= zero_below < 1:
            raise ValueError(f"a low-rank router needs zero_below in [0, 1), not {zero_below}")
        if not 0 < positive_weight < float("inf"):
            raise ValueError(
                f"a low-rank router needs a positive_weight above 0, not {positive_weight}"
            )
        self.zero_below, self.positive_weight = zero_below, positive_weight
        self.first = LinearFP32(width, rank, bias=False)
        self.second = LinearFP32(rank, routed, bias=bias)

    @property
    def needs_zeros(self) -> bool:
        return self.zero_below == 0

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """At random; the options are those of the class after `routed`."""
        return cls(ffn.width, importance.routed, **options)

    @property
    def last(self) -> ProductFP32:
        """The second layer."""
        return self.second

    def enters_last_TK(self, x_TD: Tensor) -> Tensor:
        """What the first layer leaves."""
        return torch.relu(self.first(x_TD))

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """Whether the expert is non-zero."""
        return importance.nonzero_TR(h_TF, self.zero_below)

    def label_TR(self, target_TR: Tensor) -> Tensor:
        """The target itself."""
        return target_TR.float()

    @torch.no_grad()
    def prepare(self, target_TR: Tensor) -> None:
        """b becomes the constant of least loss, as if one more token had half of each expert."""
        if self.second.bias is None:
            return
        on_R = torch.stack([part_TR.sum(0) for part_TR in target_TR.split(ROWS)]).sum(0) + 0.5
        off_R = len(target_TR) + 1 - on_R
        self.second.bias.copy_((self.positive_weight * on_R / off_R).log())

    def flops(self) -> int:
        return matrix_flops(self.first.weight, self.second.weight)
