"""The definition of `sparse_ffn`, in plain PyTorch: what every faster backend must equal.

Letters: T tokens, D model width, F neurons, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sparse_ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    mask_TE: Tensor,
    *,
    gate_FD: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """y_TD = sum over the selected experts e of E_e(x); differentiable in every floating input.

    The mask may be boolean (an expert is on or off) or floating (a soft weight per expert).
    """
    up_TF = x_TD @ up_FD.T
    h_TF = act(up_TF) if gate_FD is None else act(x_TD @ gate_FD.T) * up_TF
    return (h_TF * neuron_mask(mask_TE, len(down_FD)).to(h_TF.dtype)) @ down_FD


def neuron_mask(mask_TE: Tensor, neurons: int) -> Tensor:
    """mask_TF: each expert's entry for each of its neurons; the first F mod E have one more."""
    size, longer = divmod(neurons, mask_TE.shape[-1])
    sizes_E = torch.full(mask_TE.shape[-1:], size, device=mask_TE.device)
    sizes_E[:longer] += 1
    return mask_TE.repeat_interleave(sizes_E, dim=-1, output_size=neurons)
