"""Hands the experts of an MoE host to the kernels.

Letters: T tokens, D model width, F neurons of one expert, X experts of the host, K experts that
the host chooses for a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_tools.hosts.activations import kernel_act, kernel_up_act
from moe_tools.kernels.activations import Act, ActivationLike
from moe_tools.kernels.moe import ExpertWeights, moe_ffn

IMPLEMENTATION = "moe_tools"
"""The `experts_implementation` of transformers that runs these kernels."""


def run_experts(
    gate_up_XFD: Tensor,
    down_XDF: Tensor,
    act: nn.Module,
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
) -> Tensor:
    """Returns y_TD of one layer's experts, fused as in transformers (gate rows, then up)."""
    gate_XFD, up_XFD = gate_up_XFD.unflatten(1, (2, -1)).unbind(1)
    acts: tuple[ActivationLike, ActivationLike] = (kernel_act(act) or act, kernel_up_act(act))
    experts = ExpertWeights(gate_XFD, up_XFD, down_XDF.transpose(1, 2), *acts)
    return moe_ffn(experts, x_TD, chosen_TK, weight_TK)


@torch.no_grad()
def lay_out(down_XDF: Tensor) -> Tensor:
    """Copies the numbers so that a neuron is a row in memory, as kernels read it; shapes stay."""
    return down_XDF.transpose(1, 2).contiguous().transpose(1, 2)


def as_one(parts: Sequence[Tensor]) -> Tensor:
    """Stacks tensors of one shape: as a view where they are slices of one tensor, evenly apart.

    With gradients they are copied: what flows back has to reach each of them.
    """
    first = parts[0]
    wants = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    starts = [part.storage_offset() for part in parts]
    step = starts[1] - starts[0] if len(parts) > 1 else first.numel()
    even = starts == [starts[0] + index * step for index in range(len(parts))]
    memories = {(part.untyped_storage().data_ptr(), part.stride()) for part in parts}
    if wants or not even or step < 0 or len(memories) > 1:
        return torch.stack(tuple(parts))
    return first.detach().as_strided((len(parts), *first.shape), (step, *first.stride()))


def one_activation(acts: Sequence[nn.Module]) -> nn.Module | None:
    """Returns the activation of all experts, or None: they differ, or no kernel computes it."""
    known: set[tuple[Act | None, ActivationLike]] = {
        (kernel_act(act), kernel_up_act(act)) for act in acts
    }
    return acts[0] if len(known) == 1 and kernel_act(acts[0]) is not None else None
