"""Every neuron by matrix products, then the mask: what the reference computes, in less memory.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts, N of one expert.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from moe_tools.kernels.weights import FFNWeights


def dense_ffn(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
    """y_TD; without gradients, since h is written over."""
    h_TF, *others = (act(linear(x_TD, rows_FD, bias_F)) for rows_FD, bias_F, act in weights.inputs)
    for part_TF in others:
        h_TF.mul_(part_TF)
    if mask_TE is not None:
        _switch(h_TF, mask_TE.to(h_TF.dtype), weights.off_F)
    return linear(h_TF, weights.down_FD.T, weights.down_D)


def _switch(h_TF: Tensor, mask_TE: Tensor, off_F: Tensor | None) -> None:
    """h = off + mask (h - off), expert by expert; the first F mod E have a neuron more."""
    if off_F is not None:
        h_TF.sub_(off_F)
    size, longer = divmod(h_TF.shape[-1], mask_TE.shape[-1])
    in_longer = longer * (size + 1)
    for own_TF, own_TE, neurons in (
        (h_TF[..., :in_longer], mask_TE[..., :longer], size + 1),
        (h_TF[..., in_longer:], mask_TE[..., longer:], size),
    ):
        own_TF.unflatten(-1, (-1, neurons)).mul_(own_TE[..., None])
    if off_F is not None:
        h_TF.add_(off_F)
