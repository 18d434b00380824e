"""Last launches of the backward pass: the gradients of the weights and of the mask.

Each program owns what it writes and adds its tokens in order: nothing atomic.

Letters: T tokens of one tile, D columns of one tile, N neurons of one program, F neurons, E
experts.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.device import load_weight_TN, load_x_TD, neuron_major
from moe_tools.kernels.triton.hidden import HiddenGrads
from moe_tools.kernels.triton.kernel_launch import KernelLaunch

EXPERTS = 32
"""How many experts one program of the mask's gradient owns."""


class Gradients(NamedTuple):
    """A gradient for each operand of a `Call`, under the operand's name; None where there is none.

    That of `down_D` is missing: it is dy summed over the tokens, and no kernel computes it.
    """

    x_TD: Tensor
    gate_FD: Tensor
    up_FD: Tensor | None
    down_FD: Tensor
    mask_TE: Tensor | None
    gate_F: Tensor | None
    up_F: Tensor | None

    @classmethod
    def blank(cls, call: Call) -> Self:
        """Contiguous memory for the gradients of a call."""
        return cls(
            x_TD=_like(call.x_TD),
            gate_FD=_like(call.gate_FD),
            up_FD=None if call.up_FD is None else _like(call.up_FD),
            down_FD=_like(call.down_FD),
            mask_TE=_like(call.mask_TE) if call.mask_TE is not None and call.learns_mask else None,
            gate_F=None if call.gate_F is None else _like(call.gate_F),
            up_F=None if call.up_F is None else _like(call.up_F),
        )


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@triton.jit
def load_values_TN(values, tokens, neuron_N, runs_TN, F, BLOCK_T: tl.constexpr):
    """Loads neuron-major values; zero where a neuron does not run, as nothing is written there."""
    from_TN = values + neuron_major(tokens, neuron_N, F, BLOCK_T)
    return tl.load(from_TN, mask=runs_TN, other=0.0)


@triton.jit
def add_outer(sums_ND, values_TN, x_TD, BLOCK_T: tl.constexpr):
    """Returns sums + values^T x."""
    if BLOCK_T == 1:
        return sums_ND + tl.trans(values_TN).to(tl.float32) * x_TD.to(tl.float32)
    else:
        return tl.dot(tl.trans(values_TN), x_TD, sums_ND, input_precision="ieee")


@triton.jit
def write_ND(to, sums_ND, neuron_N, column_D, D, inside_ND):
    """Writes a tile of a weight's gradient."""
    at_ND = neuron_N[:, None].to(tl.int64) * D + column_D[None, :]
    tl.store(to + at_ND, sums_ND.to(to.dtype.element_ty), mask=inside_ND)


@triton.jit
def write_bias_N(to, sums_N, neuron_N, F):
    """Writes a part of a bias's gradient, if there is a bias."""
    if to is not None:
        tl.store(to + neuron_N, sums_N.to(to.dtype.element_ty), mask=neuron_N < F)


@triton.jit
def compute_weight_grads(
    x, dy, mask, hidden, d_gate_x, d_up_x, d_gate, d_up, d_down, d_gate_bias, d_up_bias,
    T, D, F, E, token_tiles,
    GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_N rows of every weight's gradient, zeros for neurons that no token selects."""
    neuron_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gate_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    up_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    down_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    gate_N = tl.zeros((BLOCK_N,), tl.float32)
    up_N = tl.zeros((BLOCK_N,), tl.float32)
    for tokens in range(token_tiles):
        token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
        runs_TN = load_weight_TN(mask, token_T, neuron_N, neuron_N < F, T, F, E) != 0
        if tl.max(runs_TN.to(tl.int32)) > 0:
            x_TD = load_x_TD(x, token_T, column_D, T, D)
            dy_TD = load_x_TD(dy, token_T, column_D, T, D)
            values_TN = load_values_TN(hidden, tokens, neuron_N, runs_TN, F, BLOCK_T)
            down_ND = add_outer(down_ND, values_TN, dy_TD, BLOCK_T)
            values_TN = load_values_TN(d_gate_x, tokens, neuron_N, runs_TN, F, BLOCK_T)
            gate_ND = add_outer(gate_ND, values_TN, x_TD, BLOCK_T)
            gate_N += tl.sum(values_TN.to(tl.float32), 0)
            if GATED:
                values_TN = load_values_TN(d_up_x, tokens, neuron_N, runs_TN, F, BLOCK_T)
                up_ND = add_outer(up_ND, values_TN, x_TD, BLOCK_T)
                up_N += tl.sum(values_TN.to(tl.float32), 0)
    inside_ND = (neuron_N < F)[:, None] & (column_D < D)[None, :]
    write_ND(d_down, down_ND, neuron_N, column_D, D, inside_ND)
    write_ND(d_gate, gate_ND, neuron_N, column_D, D, inside_ND)
    if GATED:
        write_ND(d_up, up_ND, neuron_N, column_D, D, inside_ND)
    if tl.program_id(1) == 0:
        write_bias_N(d_gate_bias, gate_N, neuron_N, F)
        write_bias_N(d_up_bias, up_N, neuron_N, F)


def launch_weight_grads(
    call: Call, dy_TD: Tensor, values: HiddenGrads, made: Gradients
) -> KernelLaunch:
    """The launch that writes the gradients of weights and biases into `made`."""
    rows, columns = max(16, call.tiling.rows), min(64, call.tiling.down_columns)
    arguments = {
        "x": call.x_TD,
        "dy": dy_TD,
        "mask": call.mask,
        "hidden": values.hidden,
        "d_gate_x": values.d_gate_x,
        "d_up_x": values.d_up_x,
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


@triton.jit
def compute_mask_grads(
    mask, d_weight, d_mask, T, F, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Writes the gradient of each selected expert's weight, summed over its neurons; else zero."""
    expert_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.program_id(1)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_TE = (token_T < T)[:, None] & (expert_E < E)[None, :]
    at_TE = token_T[:, None].to(tl.int64) * E + expert_E[None, :]
    runs_TE = tl.load(mask + at_TE, mask=inside_TE, other=0.0) != 0
    size, longer = F // E, F % E
    start_E = expert_E * size + tl.minimum(expert_E, longer)
    length_E = size + (expert_E < longer).to(tl.int32)
    sums_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for neuron in range(size + 1):
        here_TE = runs_TE & (neuron < length_E)[None, :]
        sums_TE += load_values_TN(d_weight, tokens, start_E + neuron, here_TE, F, BLOCK_T)
    tl.store(d_mask + at_TE, sums_TE.to(d_mask.dtype.element_ty), mask=inside_TE)


def launch_mask_grads(call: Call, values: HiddenGrads, made: Gradients) -> KernelLaunch:
    """The launch that writes the mask's gradient into `made`."""
    arguments = {
        "mask": call.mask,
        "d_weight": values.d_weight,
        "d_mask": made.mask_TE,
        **call.mask_sizes,
        "BLOCK_T": call.tokens,
        "BLOCK_E": EXPERTS,
    }
    grid = (-(-call.sizes["E"] // EXPERTS), call.token_tiles)
    return KernelLaunch(compute_mask_grads, grid, arguments, call.tiling.warps)
