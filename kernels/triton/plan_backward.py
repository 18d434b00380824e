"""The launches of the backward pass. Letters: T tokens, D model width, F neurons, E experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_tools.kernels.triton.call import Call, Lists
from moe_tools.kernels.triton.gradients import compute_mask_grads, compute_weight_grads
from moe_tools.kernels.triton.hidden import compute_hidden_grads
from moe_tools.kernels.triton.plan import (
    KernelLaunch,
    for_launch_two,
    grid_two,
    plan_combine,
    plan_list,
    stride,
)

EXPERTS = 32
"""Of one program of the mask's gradient."""


class Gradients(NamedTuple):
    """Of every operand of a `Call`, in their order; None where there is none."""

    x_TD: Tensor
    gate_FD: Tensor
    up_FD: Tensor | None
    down_FD: Tensor
    mask_TE: Tensor | None
    gate_F: Tensor | None
    up_F: Tensor | None

    @classmethod
    def of(cls, call: Call) -> Gradients:
        """Memory for them. A boolean mask has no gradient."""
        mask_TE = call.mask_TE
        learns = mask_TE is not None and mask_TE.dtype.is_floating_point
        weights = (call.x_TD, call.gate_FD, call.up_FD, call.down_FD)
        likes = (*weights, mask_TE if learns else None, call.gate_F, call.up_F)
        return cls(*map(_blank, likes))  # type: ignore[arg-type]


class _Hidden(NamedTuple):
    """h and the gradients of gate x, up x and each neuron's weight, as `Call.values`."""

    hidden: Tensor
    d_gate: Tensor
    d_up: Tensor | None
    d_weight: Tensor | None


def plan_backward(call: Call, dy_TD: Tensor) -> tuple[list[KernelLaunch], Gradients]:
    """Four launches, five with a mask that learns (and `add_shares`), and what they write.

    The list is made again and h is computed again: nothing but the operands is kept for it.
    """
    lists, made = Lists.of(call, call.tiling.tile), Gradients.of(call)
    d_up = None if call.up_FD is None else call.values()
    d_weight = None if made.mask_TE is None else call.values(torch.float32)
    values = _Hidden(call.values(), call.values(), d_up, d_weight)
    pairs = [(values.d_gate, call.gate_FD)]
    if call.up_FD is not None and d_up is not None:
        pairs.append((d_up, call.up_FD))
    own = {"bias": None, "scale": None, **call.grouping, "SKIP_ZEROS": False}
    launches = [
        plan_list(call, lists),
        _plan_hidden_grads(call, lists, dy_TD, values),
        *plan_combine(call, lists, pairs, made.x_TD, own),
        _plan_weight_grads(call, dy_TD, values, made),
    ]
    if d_weight is not None and made.mask_TE is not None:
        launches.append(_plan_mask_grads(call, d_weight, made.mask_TE))
    return launches, made


def _blank(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _plan_hidden_grads(call: Call, lists: Lists, dy_TD: Tensor, values: _Hidden) -> KernelLaunch:
    columns = call.tiling.columns
    arguments = {
        **for_launch_two(call, lists),
        # With a third stream, one token, whose sums stand in registers, takes half the columns.
        "BLOCK_D": columns if call.tokens > 1 else max(1, columns // 2),
        "dy": dy_TD,
        "gate": call.gate_FD,
        "down": call.down_FD,
        "down_stride": stride(call.down_FD),
        **values._asdict(),
    }
    return KernelLaunch(compute_hidden_grads, grid_two(call, lists), arguments, call.tiling.warps)


def _plan_weight_grads(call: Call, dy_TD: Tensor, values: _Hidden, made: Gradients) -> KernelLaunch:
    rows, columns = max(16, call.tiling.rows), min(64, call.tiling.down_columns)
    arguments = {
        "x": call.x_TD,
        "dy": dy_TD,
        "mask": call.mask,
        "hidden": values.hidden,
        "d_gate_x": values.d_gate,
        "d_up_x": values.d_up,
        "d_gate": made.gate_FD,
        "d_up": made.up_FD,
        "d_down": made.down_FD,
        "d_gate_bias": made.gate_F,
        "d_up_bias": made.up_F,
        **call.sizes,
        "token_tiles": call.token_tiles,
        "GATED": call.up_FD is not None,
        "BLOCK_T": call.tokens,
        "BLOCK_N": rows,
        "BLOCK_D": columns,
    }
    grid = (-(-call.sizes["F"] // rows), -(-call.sizes["D"] // columns))
    return KernelLaunch(compute_weight_grads, grid, arguments, call.tiling.warps)


def _plan_mask_grads(call: Call, d_weight: Tensor, d_mask: Tensor) -> KernelLaunch:
    sizes = {name: size for name, size in call.sizes.items() if name != "D"}
    arguments = {
        "mask": call.mask,
        "d_weight": d_weight,
        "d_mask": d_mask,
        **sizes,
        "BLOCK_T": call.tokens,
        "BLOCK_E": EXPERTS,
    }
    grid = (-(-call.sizes["E"] // EXPERTS), call.token_tiles)
    return KernelLaunch(compute_mask_grads, grid, arguments, call.tiling.warps)
