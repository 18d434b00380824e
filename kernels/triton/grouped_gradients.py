"""The backward pass of tokens grouped by expert. Each program owns what it writes.

Letters: T tokens of one tile, D columns of one step, N neurons of one program (also: of one
expert), X experts, P pairs of a token and an expert, K pairs of one token.
"""

from functools import partial
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_tools.kernels.triton.device import load_x_TD, neuron_major, project_TN
from moe_tools.kernels.triton.gradients import add_outer, load_values_TN, write_ND
from moe_tools.kernels.triton.grouped import (
    Pairs,
    expert_rows,
    find_expert,
    find_pairs,
    load_weight_T,
    pairs_of,
    rows_of,
    sum_pairs,
)
from moe_tools.kernels.triton.grouped_call import GroupedCall
from moe_tools.kernels.triton.hidden import write_hidden_grads
from moe_tools.kernels.triton.kernel_launch import KernelLaunch


class PairsGrads(NamedTuple):
    """h, and the gradients of gate x and up x, of each pair."""

    hidden: Tensor
    d_gate_x: Tensor
    d_up_x: Tensor

    @classmethod
    def blank(cls, call: GroupedCall) -> Self:
        """Memory for the values of a call."""
        return cls(hidden=call.values(), d_gate_x=call.values(), d_up_x=call.values())


class GroupedGradients(NamedTuple):
    """What the launches of the backward pass write; x and weights still by pair."""

    x_PD: Tensor
    gate_XND: Tensor
    up_XND: Tensor
    down_XND: Tensor
    weight_PB: Tensor
    """B blocks of neurons, to be added."""

    @classmethod
    def blank(cls, call: GroupedCall) -> Self:
        """Contiguous memory for the gradients of a call."""
        like = partial(torch.empty_like, memory_format=torch.contiguous_format)
        return cls(
            x_PD=call.by_pair(),
            gate_XND=like(call.gate_XND),
            up_XND=like(call.up_XND),
            down_XND=like(call.down_XND),
            weight_PB=call.empty(call.num_pairs, call.blocks, dtype=torch.float32),
        )


@triton.jit
def compute_pairs_hidden_grads(
    x, dy, gate, up, down, gate_stride, up_stride, down_stride, gate_expert, up_expert,
    down_expert, weight, hidden, d_gate_x, d_up_x, d_weight, pairs, counts,
    T, D, N, X, P, K, threshold, up_threshold,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes h, the gradients of gate x and up x, and its part of that of each pair's weight."""
    tile = tl.program_id(1)
    expert, pair_T = find_pairs(pairs, counts, tile, T, X, P, BLOCK_T, EXPERTS)
    if expert >= X:
        return
    neuron_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    on_N = neuron_N < N
    gate_TN, up_TN, dh_TN = project_TN(
        x, dy, rows_of(gate, expert, gate_expert), None, gate_stride,
        rows_of(up, expert, up_expert), None, up_stride,
        rows_of(down, expert, down_expert), down_stride,
        pair_T // K, neuron_N, neuron_N, on_N, T, D, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    weight_TN = tl.broadcast_to(load_weight_T(weight, pair_T, P)[:, None], (BLOCK_T, BLOCK_N))
    d_weight_TN = write_hidden_grads(
        hidden, d_gate_x, d_up_x, neuron_major(tile, neuron_N, N, BLOCK_T), on_N,
        gate_TN, up_TN, dh_TN, weight_TN, None, threshold, up_threshold, ACT, UP_ACT, True,
    )  # fmt: skip
    to_T = d_weight + pair_T.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(to_T, tl.sum(d_weight_TN, 1), mask=pair_T < P)


def launch_pairs_hidden_grads(
    call: GroupedCall, pairs: Pairs, dy_TD: Tensor, values: PairsGrads, made: GroupedGradients
) -> KernelLaunch:
    """The launch that writes `values`, and the gradients of the pairs' weights into `made`."""
    arguments = {
        **call.sizes,
        **call.activation,
        **pairs._asdict(),
        **expert_rows("gate", call.gate_XND),
        **expert_rows("up", call.up_XND),
        **expert_rows("down", call.down_XND),
        **values._asdict(),
        "x": call.x_TD,
        "dy": dy_TD,
        "weight": call.weight_TK,
        "d_weight": made.weight_PB,
        "K": call.chosen_TK.shape[1],
        "BLOCK_N": call.tiling.rows,
        "BLOCK_D": call.tiling.columns,
    }
    grid = (call.blocks, call.tiles)
    return KernelLaunch(compute_pairs_hidden_grads, grid, arguments, call.tiling.warps)


def launch_combine_pairs_grads(
    call: GroupedCall, pairs: Pairs, values: PairsGrads, made: GroupedGradients
) -> KernelLaunch:
    """The launch that writes dx of each pair into `made`."""
    streams = {
        "hidden": values.d_gate_x,
        "rows": call.gate_XND,
        "stride": call.gate_XND.stride(1),
        "rows_expert": call.gate_XND.stride(0),
        "hidden_2": values.d_up_x,
        "rows_2": call.up_XND,
        "stride_2": call.up_XND.stride(1),
        "rows_2_expert": call.up_XND.stride(0),
    }
    return sum_pairs(call, pairs, streams, made.x_PD)


@triton.jit
def compute_experts_grads(
    x, dy, hidden, d_gate_x, d_up_x, d_gate, d_up, d_down, pairs, counts, T, D, N, X, P, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_N rows of every gradient of one expert; zeros where no token chose it."""
    expert = tl.program_id(2)
    neuron_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end, count = find_expert(counts, expert, X, BLOCK_T, EXPERTS)
    gate_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    up_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    down_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(start, end):
        pair_T = pairs_of(pairs, expert, (tile - start) * BLOCK_T, count, T, P, BLOCK_T)
        here_TN = (pair_T < P)[:, None] & (neuron_N < N)[None, :]
        x_TD = load_x_TD(x, pair_T // K, column_D, T, D)
        dy_TD = load_x_TD(dy, pair_T // K, column_D, T, D)
        values_TN = load_values_TN(hidden, tile, neuron_N, here_TN, N, BLOCK_T)
        down_ND = add_outer(down_ND, values_TN, dy_TD, BLOCK_T)
        values_TN = load_values_TN(d_gate_x, tile, neuron_N, here_TN, N, BLOCK_T)
        gate_ND = add_outer(gate_ND, values_TN, x_TD, BLOCK_T)
        values_TN = load_values_TN(d_up_x, tile, neuron_N, here_TN, N, BLOCK_T)
        up_ND = add_outer(up_ND, values_TN, x_TD, BLOCK_T)
    row_N = expert * N + neuron_N
    inside_ND = (neuron_N < N)[:, None] & (column_D < D)[None, :]
    write_ND(d_down, down_ND, row_N, column_D, D, inside_ND)
    write_ND(d_gate, gate_ND, row_N, column_D, D, inside_ND)
    write_ND(d_up, up_ND, row_N, column_D, D, inside_ND)


def launch_experts_grads(
    call: GroupedCall, pairs: Pairs, dy_TD: Tensor, values: PairsGrads, made: GroupedGradients
) -> KernelLaunch:
    """The launch that writes the gradients of the experts' weights into `made`."""
    rows, columns = min(32, call.tiling.rows), min(64, call.tiling.down_columns)  # three sums
    arguments = {
        **call.sizes,
        **pairs._asdict(),
        **values._asdict(),
        "x": call.x_TD,
        "dy": dy_TD,
        "d_gate": made.gate_XND,
        "d_up": made.up_XND,
        "d_down": made.down_XND,
        "K": call.chosen_TK.shape[1],
        "BLOCK_N": rows,
        "BLOCK_D": columns,
    }
    experts, neurons, width = call.gate_XND.shape
    grid = (-(-neurons // rows), -(-width // columns), experts)
    return KernelLaunch(compute_experts_grads, grid, arguments, call.tiling.warps)
