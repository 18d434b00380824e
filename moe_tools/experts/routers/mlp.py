"""MoEfication's router. Letters: T tokens, D model width, F neurons, R experts that are routed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import LabelRouter, LinearFP32, ProductFP32, matrix_flops
from moe_tools.experts.routers.rows import mean_rows_RD
from moe_tools.hosts.ffn import FFN


class MLPRouter(LabelRouter):
    """sigmoid(W_2 tanh(W_1 x / ||x||)) (MoEfication, arXiv 2110.01786).

    W_1 starts at the mean rows of the experts, W_2 at the identity.
    """

    def __init__(self, width: int, routed: int) -> None:
        super().__init__()
        self.first = LinearFP32(width, routed, bias=False)
        self.second = LinearFP32(routed, routed, bias=False)

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """At the paper's start."""
        router = cls(ffn.width, importance.routed, **options)
        with torch.no_grad():
            router.first.weight.copy_(mean_rows_RD(ffn.weights().routing_FD, importance))
            nn.init.eye_(router.second.weight)
        return router

    def flops(self) -> int:
        return matrix_flops(self.first.weight, self.second.weight)

    @property
    def last(self) -> ProductFP32:
        """The second layer."""
        return self.second

    def enters_last_TK(self, x_TD: Tensor) -> Tensor:
        """What the first layer makes of x at length 1."""
        return torch.tanh(self.first(nn.functional.normalize(x_TD.float(), dim=-1)))
