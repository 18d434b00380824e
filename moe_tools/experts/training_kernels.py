"""Training on a GPU with experts that are on or off: the kernels read the selected neurons alone.

That pays where the tokens of a tile want few neurons between them, which only the device knows. So
the host looks once in a while, and chooses for all steps until it looks again.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from moe_tools.hosts.kernel_refusal import refusal
from moe_tools.hosts.projections import Projections
from moe_tools.kernels.reference import neuron_mask
from moe_tools.kernels.sparse_ffn import on_gpu, triton_kernels
from moe_tools.kernels.triton.config import MOST_TOGETHER
from moe_tools.kernels.weights import FFNWeights

EVERY = 64
"""Forward passes from one look at the union to the next: each look waits for the device."""

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_log = logging.getLogger(__name__)


class TrainingKernels:
    """Chooses between the kernels and all of h under a mask, for one FFN; a line of log says why.

    Gradients are those of the masked pass: an expert that is off gets none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._passes = 0
        self._pay = False

    def pay(self, projections: Projections, x_TD: Tensor, mask_TE: Tensor) -> bool:
        """Whether the kernels can compute this pass and are expected to be faster.

        Args:
            projections: the FFN's modules.
            x_TD: its input, in training.
            mask_TE: which experts run.
        """
        if not on_gpu(x_TD) or torch.compiler.is_compiling() or not _can(projections):
            return False
        # What is checkpointed is computed again in the backward pass, and has to choose the same:
        # there the first look stands, as other passes may come in between.
        if torch._C._current_graph_task_id() == -1:
            if not self._passes or (self._passes % EVERY == 0 and not _is_checkpointed()):
                self._look(projections, x_TD, mask_TE)
            self._passes += 1
        return self._pay

    def _look(self, projections: Projections, x_TD: Tensor, mask_TE: Tensor) -> None:
        weights, dtype = projections.weights(), computing_dtype(x_TD)
        limit = triton_kernels("packed").limits_of(weights, x_TD.device, dtype).share(MOST_TOGETHER)
        union = union_share(mask_TE, weights.neurons)
        pay = union <= limit
        if pay != self._pay or not self._passes:
            _log.info(
                "%s: %d tokens want %.0f %% of the neurons, and the kernels pay up to %.0f %%: %s",
                self.name,
                min(MOST_TOGETHER, mask_TE.shape[:-1].numel()),
                100 * union,
                100 * limit,
                "they compute these alone" if pay else "all are computed, then masked",
            )
        self._pay = pay


def computed_TD(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
    """y_TD by the kernels; gradients flow to what the weights are views of.

    W_down is copied, neuron by neuron, and under autocast every matrix is.
    """
    dtype = computing_dtype(x_TD)
    weights = weights.changed(lambda rows: rows.to(dtype).contiguous(), lambda bias: bias)
    y_TD: Tensor = triton_kernels("ffn").sparse_ffn_triton(weights, x_TD.to(dtype), mask_TE)
    return y_TD


def computing_dtype(x_TD: Tensor) -> torch.dtype:
    """That of products with x: autocast's, where it is on."""
    kind = x_TD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype


@torch.no_grad()
def union_share(mask_TE: Tensor, neurons: int) -> float:
    """The mean share of the neurons that some token of a tile wants; waits for the device."""
    tiles = mask_TE.reshape(-1, mask_TE.shape[-1]).split(MOST_TOGETHER)
    union_UE = torch.stack([tile_TE.any(0) for tile_TE in tiles])
    return float(neuron_mask(union_UE, neurons).float().mean())


def _is_checkpointed() -> bool:
    """Whether this pass keeps less than all that its backward pass takes."""
    return not torch.is_grad_enabled() or _saved_tensors_hooks(True) is not None


def _can(projections: Projections) -> bool:
    """Whether the kernels compute what these modules do, and nobody listens to one of them."""
    linears = projections.linears()
    if any(_is_placeholder(linear) for linear in linears) or refusal(projections) is not None:
        return False
    dropouts = (projections.hidden_dropout, projections.output_dropout)
    if any(getattr(dropout, "p", 0.0) for dropout in dropouts):
        return False
    heard = (*linears, projections.act)
    return not any(module._forward_hooks or module._forward_pre_hooks for module in heard)


def _is_placeholder(linear: nn.Module) -> bool:
    """Whether a weight is elsewhere: ZeRO-3 gathers it where the linear itself is called."""
    weight = linear._parameters.get("weight")
    return weight is None or weight.numel() == 0 or hasattr(weight, "ds_id")
