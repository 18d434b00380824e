"""The figures of one optimizer step: they stay on the device until the host reads them, once.

A host that reads a figure waits until the device has done all that it was given before, and the
device then waits for what the host gives it next. Two reads remain in a pass: transformers asks,
once a forward pass, whether positions begin again inside a row; and each layer of an MoE host whose
experts are taken apart asks how many tokens each of them has.

Letters: T tokens, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_tools import processes
from moe_tools.experts.experts import Routing


class Figures:
    """Sums named figures over the passes of one optimizer step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """In fp64, on the device."""
        self.passes = 0

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the figures of one pass, which are scalars."""
        for name, value in values.items():
            now = value.detach().double()
            self.sums[name] = self.sums[name] + now if name in self.sums else now
        self.passes += 1

    def means(self) -> dict[str, float]:
        """Reads the means over the passes of all processes, which see as many and all come here."""
        mine = torch.stack([*self.sums.values()]).cpu()
        means = processes.gather_rows(mine[None]).mean(0) / self.passes
        return dict(zip(self.sums, means.tolist(), strict=True))

    def mine(self, name: str) -> float:
        """Reads the mean of one figure over the passes of this process."""
        return self.sums[name].item() / self.passes


def sparsity_of(routings: Sequence[Routing]) -> Tensor:
    """Computes `moe_tools.experts.routing.routing_sparsity` on the device."""
    seen = sum(routing.tokens * routing.division.neurons for routing in routings)
    return 1 - torch.stack([_neurons_on(routing) for routing in routings]).sum().double() / seen


def _neurons_on(routing: Routing) -> Tensor:
    """Counts the neurons that ran, over all tokens; the first experts have one neuron more."""
    size, longer = divmod(routing.division.neurons, routing.division.num_experts)
    return size * routing.mask_TE.sum() + routing.mask_TE[..., :longer].sum()


def zeros_of(hidden_TF: Sequence[Tensor]) -> Tensor:
    """Computes `moe_tools.hosts.zeros.zero_share` of at least one tensor on the device."""
    zeros = torch.stack([(h_TF == 0).sum() for h_TF in hidden_TF]).sum()
    return zeros.double() / sum(h_TF.numel() for h_TF in hidden_TF)
