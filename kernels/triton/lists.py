"""First launch: which neurons run, listed on the device.

A program owns TILE neurons and one tile of tokens. It writes its neurons that run into its own
TILE places, in order, and how many they are: no atomics, no overflow, nothing for the host to
read. The next launch makes one list of the tiles' lists.

Letters: T tokens of one tile, D columns of one step, N neurons of one tile, F neurons, E experts.
"""

from dataclasses import dataclass
from typing import Any, Self

import triton
import triton.language as tl
from torch import Tensor, int32

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import next_power
from moe_tools.kernels.triton.device import (
    activate,
    load_weight_TN,
    neuron_major,
    project_TN,
    with_bias_TN,
)
from moe_tools.kernels.triton.kernel_launch import KernelLaunch, row_stride
from moe_tools.kernels.triton.rows import row_of


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What launch one writes, and the packed list that launch two makes of it."""

    tile: int
    """Neurons of one tile."""
    num_tiles: int
    num_columns: int
    """How many tiles of columns launch three has; each has a ticket."""
    neurons: Tensor
    counts: Tensor
    packed: Tensor
    tickets: Tensor

    @classmethod
    def blank(cls, call: Call, tile: int, num_tiles: int | None = None) -> Self:
        """Memory for the lists of a call; by default the tiles follow each other without gaps."""
        num_tiles = -(-call.neurons // tile) if num_tiles is None else num_tiles
        num_columns = -(-call.x_TD.shape[1] // call.tiling.down_columns)
        return cls(
            tile=tile,
            num_tiles=num_tiles,
            num_columns=num_columns,
            neurons=call.empty(call.token_tiles, num_tiles * tile, dtype=int32),
            counts=call.empty(call.token_tiles, num_tiles, dtype=int32),
            packed=call.empty(call.token_tiles, call.neurons, dtype=int32),
            tickets=call.empty(call.token_tiles, num_columns, dtype=int32),
        )

    @property
    def to_write(self) -> dict[str, Any]:
        """The arguments of launch one that are about lists, by name."""
        return {
            "neurons": self.neurons,
            "counts": self.counts,
            "tickets": self.tickets,
            "num_columns": self.num_columns,
            "TILE": self.tile,
            "COLUMNS": next_power(self.num_columns),
        }

    @property
    def to_pack(self) -> dict[str, Any]:
        """The arguments of launch two that are about lists, by name."""
        return {
            "neurons": self.neurons,
            "counts": self.counts,
            "packed": self.packed,
            "num_tiles": self.num_tiles,
            "TILE": self.tile,
            "TILES": next_power(self.num_tiles),
        }


@triton.jit
def write_tile(
    neurons, counts, tickets, neuron_N, on_N, tile, tokens, num_columns,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes a tile's list and its length; the first tile also clears launch three's tickets."""
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
    """Lists the neurons of the experts that any token of the tile selects."""
    tile, tokens = tl.program_id(0), tl.program_id(1)
    neuron_N = tile * TILE + tl.arange(0, TILE)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    weight_TN = load_weight_TN(mask, token_T, neuron_N, neuron_N < F, T, F, E)
    on_N = tl.max((weight_TN != 0).to(tl.int32), 0) > 0
    write_tile(
        neurons, counts, tickets, neuron_N, on_N, tile, tokens, num_columns, TILE, COLUMNS
    )  # fmt: skip


def launch_list_experts(call: Call, lists: Lists) -> KernelLaunch:
    """The launch that lists neurons by the mask alone."""
    arguments = {
        "mask": call.mask,
        **call.mask_sizes,
        "BLOCK_T": call.tokens,
        **lists.to_write,
    }
    grid = (lists.num_tiles, call.token_tiles)
    return KernelLaunch(list_experts, grid, arguments, call.tiling.warps)


@triton.jit
def list_firing(
    x, gate, gate_scale, gate_stride, gate_bias, mask, gates, neurons, counts, tickets,
    T, D, F, E, group, skip, num_columns, threshold,
    ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Lists the selected neurons whose activation is not zero, and keeps their gate x."""
    tile, tokens = tl.program_id(0), tl.program_id(1)
    neuron_N = tile * TILE + tl.arange(0, TILE)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    on_TN = load_weight_TN(mask, token_T, neuron_N, neuron_N < F, T, F, E) != 0
    on_N = tl.max(on_TN.to(tl.int32), 0) > 0
    gate_TN, _, _ = project_TN(
        x, None, gate, gate_scale, gate_stride, None, None, 0, None, 0, token_T, neuron_N,
        row_of(neuron_N, group, skip), on_N, T, D, BLOCK_T, TILE, BLOCK_D,
    )  # fmt: skip
    gate_TN = with_bias_TN(gate_TN, gate_bias, neuron_N, on_N)
    fires_TN = on_TN & (activate(gate_TN, threshold, ACT) != 0)
    fires_N = tl.max(fires_TN.to(tl.int32), 0) > 0
    to_TN = gates + neuron_major(tokens, neuron_N, F, BLOCK_T)
    tl.store(to_TN, gate_TN, mask=fires_N[None, :])
    write_tile(
        neurons, counts, tickets, neuron_N, fires_N, tile, tokens, num_columns, TILE, COLUMNS
    )  # fmt: skip


def launch_list_firing(call: Call, lists: Lists, gates: Tensor) -> KernelLaunch:
    """The launch that lists the neurons that fire and writes their gate x to `gates`."""
    arguments = {
        "x": call.x_TD,
        "gate": call.gate_FD,
        "gate_scale": call.gate_scale_FG,
        "gate_stride": row_stride(call.gate_FD),
        "gate_bias": call.gate_F,
        "mask": call.mask,
        "gates": gates,
        **call.sizes,
        **call.grouping,
        "threshold": call.threshold,
        "ACT": call.act,
        "BLOCK_T": call.tokens,
        "BLOCK_D": call.tiling.columns,
        **lists.to_write,
    }
    grid = (lists.num_tiles, call.token_tiles)
    return KernelLaunch(list_firing, grid, arguments, call.tiling.warps, call.stages)
