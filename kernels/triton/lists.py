"""First launch: which neurons run, listed on the device.

A program owns TILE neurons and one tile of tokens. It writes its neurons that run into its own
TILE places, in order, and how many they are: no atomics, no overflow, nothing for the host to
read. The next launch makes one list of the tiles' lists.

Letters: T tokens of one tile, D columns of one step, N neurons of one tile, F neurons, E experts.
"""

import triton
import triton.language as tl

from moe_tools.kernels.triton.device import (
    activate,
    load_weight_TN,
    neuron_major,
    project_TN,
    projected_TN,
)
from moe_tools.kernels.triton.rows import row_of


@triton.jit
def write_tile(
    neurons, counts, tickets, neuron_N, on_N, tile, tokens, num_columns,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile's list and its length; the first tile also clears the tickets of launch three."""
    row = tokens * tl.num_programs(0) + tile
    place_N = tl.cumsum(on_N.to(tl.int32), 0) - 1
    tl.store(neurons + row * TILE + place_N, neuron_N, mask=on_N)
    tl.store(counts + row, tl.sum(on_N.to(tl.int32)))
    if tile == 0:
        column = tl.arange(0, COLUMNS)
        tl.store(tickets + tokens * num_columns + column, 0, mask=column < num_columns)


@triton.jit
def list_experts(
    mask, neurons, counts, tickets, T, F, E, num_columns,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Neurons of the experts that any token of the tile selects."""
    tile, tokens = tl.program_id(0), tl.program_id(1)
    neuron_N = tile * TILE + tl.arange(0, TILE)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    weight_TN = load_weight_TN(mask, token_T, neuron_N, neuron_N < F, T, F, E)
    on_N = tl.max((weight_TN != 0).to(tl.int32), 0) > 0
    write_tile(
        neurons, counts, tickets, neuron_N, on_N, tile, tokens, num_columns, TILE, COLUMNS
    )  # fmt: skip


@triton.jit
def list_firing(
    x, gate, gate_stride, gate_scale, gate_bias, mask, gates, neurons, counts, tickets,
    T, D, F, E, group, skip, num_columns, theta,
    ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of those neurons, the ones whose activation is not zero; their gate x is kept."""
    tile, tokens = tl.program_id(0), tl.program_id(1)
    neuron_N = tile * TILE + tl.arange(0, TILE)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    on_TN = load_weight_TN(mask, token_T, neuron_N, neuron_N < F, T, F, E) != 0
    on_N = tl.max(on_TN.to(tl.int32), 0) > 0
    gate_TN, _, _ = project_TN(
        x, None, gate, None, None, gate_stride, 0, 0, token_T, neuron_N,
        row_of(neuron_N, group, skip), on_N, T, D, BLOCK_T, TILE, BLOCK_D,
    )  # fmt: skip
    gate_TN = projected_TN(gate_TN, gate_scale, gate_bias, neuron_N, on_N)
    fires_TN = on_TN & (activate(gate_TN, theta, ACT) != 0)
    fires_N = tl.max(fires_TN.to(tl.int32), 0) > 0
    to_TN = gates + neuron_major(tokens, neuron_N, F, BLOCK_T)
    tl.store(to_TN, gate_TN, mask=fires_N[None, :])
    write_tile(
        neurons, counts, tickets, neuron_N, fires_N, tile, tokens, num_columns, TILE, COLUMNS
    )  # fmt: skip
