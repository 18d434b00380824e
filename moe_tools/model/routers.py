"""Routers score: the FFN's input in, one score per expert out.

Letters: T tokens, D model width, F neurons, E experts, N = F / E neurons of one expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moe_tools.registry import Registry


class Router(nn.Module, ABC):
    """Scores every expert from the FFN's input. Routers compute in fp32 under any dtype."""

    @abstractmethod
    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TE."""

    @abstractmethod
    def target_TE(self, h_TF: Tensor, down_FD: Tensor) -> Tensor:
        """What this kind of router learns to predict from the donor's hidden activations."""

    @abstractmethod
    def flops(self) -> int:
        """Matrix FLOPs of scoring one token."""


class SigmoidRouter(Router):
    """LTE's router: G = sigmoid(W x + b), one independent score an expert (arXiv 2402.06126).

    The bias is ours: with it training starts from "every expert on" (G near 1).
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        self.bias = nn.Parameter(torch.full((num_experts,), 3.0))

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TE in (0, 1), fp32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = nn.functional.linear(x_TD.float(), self.weight.float(), self.bias.float())
            return torch.sigmoid(logits_TE)

    def target_TE(self, h_TF: Tensor, down_FD: Tensor) -> Tensor:
        """log energy of each expert: log sum over its neurons of (h ||w_down||)^2."""
        return expert_log_energy(h_TF, down_FD.float().norm(dim=1), len(self.bias))

    def flops(self) -> int:
        """Multiply and add for each weight."""
        return 2 * self.weight.numel()


def expert_log_energy(h_TF: Tensor, down_norm_F: Tensor, num_experts: int) -> Tensor:
    """log sum over an expert's neurons of (h ||w_down||)^2, (T, E) in fp32.

    The square root of the energy bounds, up to sqrt(N), how far the expert moves the output.
    """
    energy_TF = (h_TF.float() * down_norm_F).square()
    energy_TE = energy_TF.unflatten(-1, (num_experts, -1)).sum(-1)
    return energy_TE.clamp_min(1e-12).log()


ROUTERS: Registry[type[SigmoidRouter]] = Registry("router", {"sigmoid": SigmoidRouter})
