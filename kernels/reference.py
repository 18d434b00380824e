"""The definition of `sparse_ffn`, in plain PyTorch: what every faster backend must equal.

Letters: T tokens, D model width, F neurons, E experts, N = F / E neurons of one expert.
"""

from collections.abc import Callable

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
    h_TEN = h_TF.unflatten(-1, (mask_TE.shape[-1], -1)) * mask_TE[..., None].to(h_TF.dtype)
    return h_TEN.flatten(-2) @ down_FD
