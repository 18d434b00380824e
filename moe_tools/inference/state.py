"""Gives an optimised model the state dict of its host, read from the packed weights.

Letters: D model width, F neurons.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.packed_ffn import PackableFFN
from moe_tools.experts.routers.base import LabelRouter, ProductFP32
from moe_tools.hosts.layouts import child_name
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import QUANTIZED


def free_matrices(ffn: PackableFFN, dtype: torch.dtype | None) -> None:
    """Frees the matrices of a packed FFN and leaves their names, shapes and dtypes.

    From then on the state dict reads them from `packed`; if `dtype`, in which they are packed, lost
    digits, it raises a ValueError.
    """
    lossy = False
    for linear in ffn.projections.linears():
        weight = linear.get_parameter("weight")
        lossy |= dtype is not None and not _holds(dtype, weight.dtype)
        linear.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
    hook = partial(_fill, lost_in=dtype if lossy else None)
    ffn.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]


def widen_router(ffn: ExpertFFN, *, packs: bool) -> None:
    """Keeps a router in fp32, in which it computes anyway; its state dict keeps its dtypes.

    Args:
        ffn: whose router it is.
        packs: its matrices stay in their dtype, which the native kernels read, where they can; so
            does the last one where the packed FFN selects.
    """
    dtypes = {f"router.{name}": value.dtype for name, value in ffn.router.state_dict().items()}
    kept: set[int] = set()
    last = ffn.router.last if isinstance(ffn.router, LabelRouter) else None
    if last is not None and ffn.packed is not None and ffn.packed.selects:
        kept.add(id(last.weight))
    for module in ffn.router.modules():
        if packs and isinstance(module, ProductFP32):
            module.pack()
            kept |= {id(module.weight)} if module.packed is not None else set()
    for tensor in (*ffn.router.parameters(), *ffn.router.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.float()
    hook = partial(_narrow, dtypes=dtypes)
    ffn.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]


def _fill(
    ffn: PackableFFN,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    *,
    lost_in: torch.dtype | None,
) -> None:
    """Puts the matrices into a state dict. No closure: pickle finds hooks by their names."""
    if lost_in is not None:
        raise ValueError(
            f"{ffn.name} is packed as {lost_in}, which lost digits: save the model that it was "
            "made from"
        )
    assert ffn.packed is not None
    for name, tensor in _unpacked(ffn, ffn.packed).items():
        state[f"{prefix}{name}"] = tensor


def _narrow(
    _: nn.Module,
    state: dict[str, Any],
    prefix: str,
    __: Any,
    *,
    dtypes: dict[str, torch.dtype],
) -> None:
    for name, dtype in dtypes.items():
        value = state[f"{prefix}{name}"]
        if value.dtype == torch.float32:  # else the model was cast since
            state[f"{prefix}{name}"] = value.to(dtype)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` can hold every number of `other`."""
    return dtype not in QUANTIZED and torch.promote_types(other, dtype) == dtype


@torch.no_grad()
def _unpacked(ffn: PackableFFN, packed: PackedFFN) -> dict[str, Tensor]:
    """Returns the matrices by the names of the host, fused and transposed as its linears are."""
    layout, projections = ffn.layout, deepcopy(ffn.projections)
    for linear in projections.linears():
        linear.to_empty(device=packed.device)
    made, stored = projections.weights(), packed.weights
    for mine, packed_FD in (
        (made.gate_FD, stored.gate_FD),
        (made.up_FD, stored.up_FD),
        (made.down_FD, stored.down_FD),
    ):
        if mine is not None and packed_FD is not None:
            mine.copy_(packed_FD)
    paths = (layout.gate, layout.up, layout.down)
    linears = (projections.gate, projections.up, projections.down)
    return {
        f"{child_name(layout, path)}.weight": linear.get_parameter("weight").detach()
        for path, linear in zip(paths, linears, strict=True)
        if path is not None and linear is not None
    }
