"""Attach: a router on every FFN, started from the donor's own activations.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_tools.model.conversion import Conversion, attach_experts
from moe_tools.model.experts import ExpertFFN
from moe_tools.model.ffn import FFN, find_ffns
from moe_tools.model.routers import expert_log_energy
from moe_tools.recipe import Attach
from moe_tools.steps.calibrate import visit_activations

RIDGE = 1e-2
"""Ridge penalty, as a share of the mean squared input."""
SPREAD = 2.0
"""Standard deviation of the started logits: most scores clear of tau, none saturated."""


def attach(model: nn.Module, step: Attach, donor: str, expert_size: int, blocks_BT: Tensor) -> None:
    """Grafts routed FFNs onto a dense model in place.

    Start `regression` fits each router in closed form to log energy (`expert_log_energy`) and
    shifts it so that `start_sparsity` of the experts are off, in every FFN. The fit needs no
    gradient step: it is the normal equations of a ridge regression, accumulated over batches.

    Raises:
        ValueError: an unknown router or selector, or an MoE expert that saw no token.
    """
    ffns = find_ffns(model)
    conversion = Conversion(donor, expert_size, step.router, step.selector, "hard", step.when_off)
    fits = [_Fit.empty(ffn, expert_size) for ffn in ffns]
    if step.start == "regression" or step.when_off == "mean":

        def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
            fits[index].add(x_TD, h_TF)

        visit_activations(model, blocks_BT, visit, title="calibrate routers")
    experts = attach_experts(model, conversion)
    for fit, ffn in zip(fits, experts, strict=True):
        if step.start == "regression":
            fit.start(ffn, step.start_sparsity)
        if ffn.off_F is not None:
            ffn.off_F.copy_(fit.mean_F())


@dataclass
class _Fit:
    """The sums of one FFN's ridge regression, inputs standing with a constant 1."""

    down_norm_F: Tensor
    num_experts: int
    inputs_DD: Tensor
    targets_DE: Tensor
    h_F: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, ffn: FFN, expert_size: int) -> _Fit:
        up_FD = ffn.weights().up_FD
        neurons, width = up_FD.shape
        num_experts = neurons // expert_size

        def zeros(*shape: int) -> Tensor:
            return up_FD.new_zeros(shape, dtype=torch.float32)

        return cls(
            ffn.weights().down_norm_F,
            num_experts,
            zeros(width + 1, width + 1),
            zeros(width + 1, num_experts),
            zeros(neurons),
        )

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        x_TD = nn.functional.pad(x_TD.float(), (0, 1), value=1.0)
        target_TE = expert_log_energy(h_TF, self.down_norm_F, self.num_experts)
        self.inputs_DD += x_TD.T @ x_TD
        self.targets_DE += x_TD.T @ target_TE
        self.h_F += h_TF.float().sum(0)
        self.tokens += len(x_TD)

    def mean_F(self) -> Tensor:
        return self.h_F / self.tokens

    @torch.no_grad()
    def start(self, ffn: ExpertFFN, start_sparsity: float) -> None:
        """Solves and scales: logits of spread `SPREAD`, `start_sparsity` of them below zero.

        The predictions are treated as normal: their mean and variance over tokens and experts
        follow from the sums, without a second pass.
        """
        penalty = RIDGE * self.inputs_DD.diagonal()[:-1].mean()
        ridge_DD = penalty * torch.eye(len(self.inputs_DD), device=self.inputs_DD.device)
        ridge_DD[-1, -1] = 0.0
        solution_DE = torch.linalg.solve(
            (self.inputs_DD + ridge_DD).double(), self.targets_DE.double()
        )
        inputs_DD = self.inputs_DD.double() / self.tokens
        mean_E = inputs_DD[-1] @ solution_DE
        second_E = (solution_DE * (inputs_DD @ solution_DE)).sum(0)
        mean = mean_E.mean()
        deviation = (second_E.mean() - mean.square()).clamp_min(1e-12).sqrt()
        below = torch.special.ndtri(torch.tensor(start_sparsity, dtype=torch.double))
        scale = SPREAD / deviation
        ffn.router.get_parameter("weight").copy_(solution_DE[:-1].T * scale)
        ffn.router.get_parameter("bias").copy_((solution_DE[-1] - mean) * scale - SPREAD * below)
