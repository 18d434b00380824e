"""Defines `sparse_ffn` in plain PyTorch: every faster backend must equal it.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.kernels.weights import FFNWeights


def sparse_ffn_reference(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
    """Computes y_TD, the sum of E_e(x) over the selected experts e.

    Differentiable in every floating input.

    The mask may be boolean (an expert is on or off), floating (a soft weight per expert), or None
    (every expert is on). A neuron of an expert that is off, or whose weight is exactly 0,
    contributes `off_F`, where there is one, and otherwise 0, whatever its h: infinity and NaN stay
    out of y and of every gradient. (Weights must be finite: matrix products read all of them.)

    The gradient of a floating mask is the sum of h * dh over the neurons of the expert, or of
    (h - off) * dh, at 0 as elsewhere; where the mask is 0, an h that is not finite is left out.
    """
    z_TF = [linear(x_TD, rows_FD, bias_F) for rows_FD, bias_F, _ in weights.inputs]
    if mask_TE is None:
        h_TF = _hidden(weights, z_TF)
    else:
        mask_TF = neuron_mask(mask_TE, weights.neurons)
        h_TF = _hidden(weights, [_detached_where_off(part_TF, mask_TF) for part_TF in z_TF])
        h_TF = _switched(h_TF, mask_TF, weights.off_F)
    return linear(h_TF, weights.down_FD.T, weights.down_D)


def neuron_mask(mask_TE: Tensor, neurons: int) -> Tensor:
    """Returns mask_TF: the expert's entry for each neuron; the first F mod E have one more."""
    size, longer = divmod(neurons, mask_TE.shape[-1])
    sizes_E = torch.full(mask_TE.shape[-1:], size, device=mask_TE.device)
    sizes_E[:longer] += 1
    return mask_TE.repeat_interleave(sizes_E, dim=-1, output_size=neurons)


def weighed(values: Tensor, weight: Tensor) -> Tensor:
    """Returns values * weight, and 0 where the weight is 0, even for an infinite value or NaN."""
    return torch.where((weight == 0) & ~values.isfinite(), 0.0, values) * weight


def _hidden(weights: FFNWeights, z_TF: list[Tensor]) -> Tensor:
    acts = [act for _, _, act in weights.inputs]
    return reduce(torch.mul, [act(part_TF) for act, part_TF in zip(acts, z_TF, strict=True)])


def _detached_where_off(z_TF: Tensor, mask_TF: Tensor) -> Tensor:
    """Returns z, which passes no gradient where the mask is 0: it would be 0, or 0 * infinity."""
    return torch.where(mask_TF != 0, z_TF, z_TF.detach()) if z_TF.requires_grad else z_TF


def _switched(h_TF: Tensor, mask_TF: Tensor, off_F: Tensor | None) -> Tensor:
    if mask_TF.dtype == torch.bool:
        return torch.where(mask_TF, h_TF, 0.0 if off_F is None else off_F.to(h_TF.dtype))
    mask_TF = mask_TF.to(h_TF.dtype)
    if off_F is None:
        return weighed(h_TF, mask_TF)
    off_F = off_F.to(h_TF.dtype)
    finite_TF = torch.where((mask_TF == 0) & ~h_TF.isfinite(), off_F, h_TF)
    return off_F.lerp(finite_TF, mask_TF)
