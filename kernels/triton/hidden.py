"""Second launch: the hidden values of the listed neurons, forward and backward.

A program owns BLOCK_N places of one tile's list; where the list is shorter, it stops. It copies
its part of the list to where the tiles before it end: launch three finds one list without gaps.

Letters: T tokens of one tile, D columns of one step, N neurons of one program, F neurons, E
experts.
"""

import triton
import triton.language as tl

from moe_tools.kernels.triton.device import (
    activate,
    load_weight_TN,
    neuron_major,
    project_TN,
    projected_TN,
    slope,
)
from moe_tools.kernels.triton.rows import row_of


@triton.jit
def count_before(counts, tokens, tile, num_tiles, TILES: tl.constexpr):
    """Neurons listed in the tiles before this one; in all, for tile = num_tiles."""
    at = tl.arange(0, TILES)
    return tl.sum(tl.load(counts + tokens * num_tiles + at, mask=at < tile, other=0))


@triton.jit
def find_places(counts, num_tiles, BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """This program's tiles of tokens and of neurons, its first place, and where the list ends."""
    tile, tokens = tl.program_id(0) // (TILE // BLOCK_N), tl.program_id(1)
    first = (tl.program_id(0) % (TILE // BLOCK_N)) * BLOCK_N
    return tokens, tile, first, tl.load(counts + tokens * num_tiles + tile)


@triton.jit
def take_neurons(
    neurons, counts, packed, tokens, tile, first, count, num_tiles, F,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N neurons of a tile's list, and which of them exist; written to the packed list."""
    place_N = first + tl.arange(0, BLOCK_N)
    on_N = place_N < count
    row = (tokens * num_tiles + tile) * TILE
    neuron_N = tl.load(neurons + row + place_N, mask=on_N, other=0)
    before = count_before(counts, tokens, tile, num_tiles, TILES)
    tl.store(packed + tokens * F + before + place_N, neuron_N, mask=on_N)
    return neuron_N, on_N


@triton.jit
def compute_hidden(
    x, gate, up, gate_stride, up_stride, gate_scale, up_scale, gate_bias, up_bias, mask, gates,
    hidden, neurons, counts, packed, T, D, F, E, group, skip, num_tiles, theta, up_theta,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """h = weight * act(gate x) * up_act(up x); without `gate`, gate x is read from `gates`."""
    tokens, tile, first, count = find_places(counts, num_tiles, BLOCK_N, TILE)
    if first >= count:
        return
    neuron_N, on_N = take_neurons(
        neurons, counts, packed, tokens, tile, first, count, num_tiles, F, BLOCK_N, TILE, TILES
    )  # fmt: skip
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    gate_TN, up_TN, _ = project_TN(
        x, None, gate, up, None, gate_stride, up_stride, 0, token_T, neuron_N,
        row_of(neuron_N, group, skip), on_N, T, D, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if gate is None:
        from_TN = gates + neuron_major(tokens, neuron_N, F, BLOCK_T)
        gate_TN = tl.load(from_TN, mask=on_N[None, :], other=0.0)
    else:
        gate_TN = projected_TN(gate_TN, gate_scale, gate_bias, neuron_N, on_N)
    hidden_TN = activate(gate_TN, theta, ACT)
    if GATED:
        up_TN = projected_TN(up_TN, up_scale, up_bias, neuron_N, on_N)
        hidden_TN *= activate(up_TN, up_theta, UP_ACT)
    weight_TN = load_weight_TN(mask, token_T, neuron_N, on_N, T, F, E)
    hidden_TN = tl.where(weight_TN != 0, weight_TN * hidden_TN, 0.0)
    to_TN = hidden + neuron_major(tokens, neuron_N, F, BLOCK_T)
    tl.store(to_TN, hidden_TN.to(hidden.dtype.element_ty), mask=on_N[None, :])


@triton.jit
def write_hidden_grads(
    hidden, d_gate, d_up, at_TN, on_N, gate_TN, up_TN, dh_TN, weight_TN, theta, up_theta,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Writes h and the gradients of gate x and up x; that of the weight comes back."""
    runs_TN = weight_TN != 0
    dtype = hidden.dtype.element_ty
    act_TN = activate(gate_TN, theta, ACT)
    h_TN = act_TN
    d_gate_TN = dh_TN * slope(gate_TN, theta, ACT)
    if GATED:
        factor_TN = activate(up_TN, up_theta, UP_ACT)
        h_TN *= factor_TN
        d_gate_TN *= factor_TN
        d_up_TN = weight_TN * dh_TN * act_TN * slope(up_TN, up_theta, UP_ACT)
        d_up_TN = tl.where(runs_TN, d_up_TN, 0.0)
        tl.store(d_up + at_TN, d_up_TN.to(dtype), mask=on_N[None, :])
    d_gate_TN = tl.where(runs_TN, weight_TN * d_gate_TN, 0.0)
    tl.store(d_gate + at_TN, d_gate_TN.to(dtype), mask=on_N[None, :])
    hidden_TN = tl.where(runs_TN, weight_TN * h_TN, 0.0)
    tl.store(hidden + at_TN, hidden_TN.to(dtype), mask=on_N[None, :])
    return tl.where(runs_TN, h_TN * dh_TN, 0.0)


@triton.jit
def compute_hidden_grads(
    x, dy, gate, up, down, gate_stride, up_stride, down_stride, gate_bias, up_bias, mask,
    hidden, d_gate, d_up, d_weight, neurons, counts, packed,
    T, D, F, E, group, skip, num_tiles, theta, up_theta,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """h again, and the gradients of gate x, of up x, and of each neuron's weight."""
    tokens, tile, first, count = find_places(counts, num_tiles, BLOCK_N, TILE)
    if first >= count:
        return
    neuron_N, on_N = take_neurons(
        neurons, counts, packed, tokens, tile, first, count, num_tiles, F, BLOCK_N, TILE, TILES
    )  # fmt: skip
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    gate_TN, up_TN, dh_TN = project_TN(
        x, dy, gate, up, down, gate_stride, up_stride, down_stride, token_T, neuron_N,
        row_of(neuron_N, group, skip), on_N, T, D, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    gate_TN = projected_TN(gate_TN, None, gate_bias, neuron_N, on_N)
    up_TN = projected_TN(up_TN, None, up_bias, neuron_N, on_N)
    weight_TN = load_weight_TN(mask, token_T, neuron_N, on_N, T, F, E)
    d_weight_TN = write_hidden_grads(
        hidden, d_gate, d_up, neuron_major(tokens, neuron_N, F, BLOCK_T), on_N,
        gate_TN, up_TN, dh_TN, weight_TN, theta, up_theta, ACT, UP_ACT, GATED,
    )  # fmt: skip
    if d_weight is not None:
        to_TN = d_weight + neuron_major(tokens, neuron_N, F, BLOCK_T)
        tl.store(to_TN, d_weight_TN, mask=on_N[None, :])
