"""The one public operation of `moe_tools.kernels`: an FFN of which only some experts run."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from moe_tools.kernels.reference import sparse_ffn_reference

Backend = Literal["auto", "reference"]


def sparse_ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    mask_TE: Tensor,
    *,
    gate_FD: Tensor | None = None,
    act: Callable[[Tensor], Tensor],
    backend: Backend = "auto",
) -> Tensor:
    """Runs only the experts that `mask_TE` selects and returns y_TD.

    Experts are contiguous slices of the F neurons; where E does not divide F, the first F mod E
    experts have one neuron more. `down_FD` is W_down transposed, so that one neuron is one row
    of each weight. `gate_FD` makes the FFN gated (h = act(gate x) * up x); without it
    h = act(up x).

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    _check_shapes(x_TD, up_FD, down_FD, mask_TE, gate_FD)
    if backend not in ("auto", "reference"):
        raise ValueError(f"unknown backend {backend!r}; known: auto, reference")
    return sparse_ffn_reference(x_TD, up_FD, down_FD, mask_TE, gate_FD=gate_FD, act=act)


def _check_shapes(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, mask_TE: Tensor, gate_FD: Tensor | None
) -> None:
    if up_FD.ndim != 2:
        raise ValueError(f"up_FD is {tuple(up_FD.shape)}; weights are (neurons, width)")
    neurons, width = up_FD.shape
    for name, weight in (("down_FD", down_FD), ("gate_FD", gate_FD)):
        if weight is not None and weight.shape != up_FD.shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}; up_FD is {tuple(up_FD.shape)}")
    if x_TD.shape[-1:] != (width,):
        raise ValueError(f"x_TD is {tuple(x_TD.shape)}; the weights have width {width}")
    if mask_TE.ndim != x_TD.ndim or mask_TE.shape[:-1] != x_TD.shape[:-1]:
        raise ValueError(f"mask_TE is {tuple(mask_TE.shape)}; x_TD is {tuple(x_TD.shape)}")
    experts = mask_TE.shape[-1]
    if not 1 <= experts <= neurons:
        raise ValueError(f"{neurons} neurons cannot make {experts} experts")
