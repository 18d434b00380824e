"""The definition of `sparse_ffn`, in plain PyTorch: what every faster backend must equal.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.kernels.weights import FFNWeights


def sparse_ffn_reference(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
    """y_TD = sum over the selected experts e of E_e(x); differentiable in every floating input.

    The mask may be boolean (an expert is on or off), floating (a soft weight per expert), or None
    (every expert is on). A neuron of an expert that is off contributes `off_F`, where there is one.
    """
    parts = [act(linear(x_TD, rows_FD, bias_F)) for rows_FD, bias_F, act in weights.inputs]
    h_TF = reduce(torch.mul, parts)
    if mask_TE is not None:
        mask_TF = neuron_mask(mask_TE, weights.neurons).to(h_TF.dtype)
        h_TF = h_TF * mask_TF if weights.off_F is None else weights.off_F.lerp(h_TF, mask_TF)
    return linear(h_TF, weights.down_FD.T, weights.down_D)


def neuron_mask(mask_TE: Tensor, neurons: int) -> Tensor:
    """mask_TF: each expert's entry for each of its neurons; the first F mod E have one more."""
    size, longer = divmod(neurons, mask_TE.shape[-1])
    sizes_E = torch.full(mask_TE.shape[-1:], size, device=mask_TE.device)
    sizes_E[:longer] += 1
    return mask_TE.repeat_interleave(sizes_E, dim=-1, output_size=neurons)
