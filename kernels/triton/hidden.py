"""Second launch: the hidden values of the listed neurons, forward and backward.

A program owns BLOCK_N places of one tile's list; where the list is shorter, it stops. It copies
its part of the list to where the tiles before it end: launch three finds one list without gaps.

Letters: T tokens of one tile, D columns of one step, N neurons of one program, F neurons, E
experts.
"""

from typing import Any, NamedTuple, Self

import triton
import triton.language as tl
from torch import Tensor, float32

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.device import (
    activate,
    load_N,
    load_weight_TN,
    neuron_major,
    project_TN,
    slope,
    with_bias_TN,
)
from moe_tools.kernels.triton.kernel_launch import KernelLaunch, row_stride
from moe_tools.kernels.triton.lists import Lists
from moe_tools.kernels.triton.rows import row_of


class HiddenGrads(NamedTuple):
    """h, and the gradients of gate x, up x and each neuron's weight, laid out as `Call.values`."""

    hidden: Tensor
    d_gate_x: Tensor
    d_up_x: Tensor | None
    d_weight: Tensor | None

    @classmethod
    def blank(cls, call: Call) -> Self:
        """Memory for them; none for up in a plain FFN, or for weights under a mask of booleans."""
        return cls(
            hidden=call.values(),
            d_gate_x=call.values(),
            d_up_x=None if call.up_FD is None else call.values(),
            d_weight=call.values(float32) if call.learns_mask else None,
        )


@triton.jit
def count_before(counts, tokens, tile, num_tiles, TILES: tl.constexpr):
    """Counts the neurons listed in the tiles before this one; all of them for `num_tiles`."""
    at = tl.arange(0, TILES)
    return tl.sum(tl.load(counts + tokens * num_tiles + at, mask=at < tile, other=0))


@triton.jit
def find_places(counts, num_tiles, BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """Finds this program's tiles of tokens and neurons, its first place, and the list's end."""
    tile, tokens = tl.program_id(0) // (TILE // BLOCK_N), tl.program_id(1)
    first = (tl.program_id(0) % (TILE // BLOCK_N)) * BLOCK_N
    return tokens, tile, first, tl.load(counts + tokens * num_tiles + tile)


@triton.jit
def take_neurons(
    neurons, counts, packed, tokens, tile, first, count, num_tiles, F,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Loads BLOCK_N neurons of a tile's list and writes those that exist to the packed list."""
    place_N = first + tl.arange(0, BLOCK_N)
    on_N = place_N < count
    row = (tokens * num_tiles + tile) * TILE
    neuron_N = tl.load(neurons + row + place_N, mask=on_N, other=0)
    before = count_before(counts, tokens, tile, num_tiles, TILES)
    tl.store(packed + tokens * F + before + place_N, neuron_N, mask=on_N)
    return neuron_N, on_N


@triton.jit
def compute_hidden(
    x, gate, gate_scale, gate_stride, gate_bias, up, up_scale, up_stride, up_bias, off, mask, gates,
    hidden, neurons, counts, packed, T, D, F, E, group, skip, num_tiles, threshold, up_threshold,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes h = weight * (act(gate x) * up_act(up x) - off) of the listed neurons.

    Without `gate`, gate x is what launch one left in `gates`.
    """
    tokens, tile, first, count = find_places(counts, num_tiles, BLOCK_N, TILE)
    if first >= count:
        return
    neuron_N, on_N = take_neurons(
        neurons, counts, packed, tokens, tile, first, count, num_tiles, F, BLOCK_N, TILE, TILES
    )  # fmt: skip
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    gate_TN, up_TN, _ = project_TN(
        x, None, gate, gate_scale, gate_stride, up, up_scale, up_stride, None, 0, token_T,
        neuron_N, row_of(neuron_N, group, skip), on_N, T, D, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if gate is None:
        from_TN = gates + neuron_major(tokens, neuron_N, F, BLOCK_T)
        gate_TN = tl.load(from_TN, mask=on_N[None, :], other=0.0)
    else:
        gate_TN = with_bias_TN(gate_TN, gate_bias, neuron_N, on_N)
    hidden_TN = activate(gate_TN, threshold, ACT)
    if GATED:
        up_TN = with_bias_TN(up_TN, up_bias, neuron_N, on_N)
        hidden_TN *= activate(up_TN, up_threshold, UP_ACT)
    if off is not None:
        hidden_TN -= load_N(off, neuron_N, on_N)[None, :]
    weight_TN = load_weight_TN(mask, token_T, neuron_N, on_N, T, F, E)
    hidden_TN = tl.where(weight_TN != 0, weight_TN * hidden_TN, 0.0)
    to_TN = hidden + neuron_major(tokens, neuron_N, F, BLOCK_T)
    tl.store(to_TN, hidden_TN.to(hidden.dtype.element_ty), mask=on_N[None, :])


def launch_hidden(call: Call, lists: Lists, gates: Tensor | None, hidden: Tensor) -> KernelLaunch:
    """The launch that writes h; with `gates`, gate x has been computed by launch one."""
    arguments = {
        **_operands(call, lists),
        "gate": call.gate_FD if gates is None else None,
        "gate_scale": call.gate_scale_FG,
        "up_scale": call.up_scale_FG,
        "gates": gates,
        "hidden": hidden,
        "BLOCK_D": call.tiling.columns,
    }
    grid = _grid(call, lists)
    return KernelLaunch(compute_hidden, grid, arguments, call.tiling.warps, call.stages)


def _operands(call: Call, lists: Lists) -> dict[str, Any]:
    """Arguments that launch two takes in both directions."""
    return {
        "x": call.x_TD,
        "up": call.up_FD,
        "gate_stride": row_stride(call.gate_FD),
        "up_stride": row_stride(call.up_FD),
        "gate_bias": call.gate_F,
        "up_bias": call.up_F,
        "off": call.off_F,
        "mask": call.mask,
        **call.sizes,
        **call.grouping,
        **call.activation,
        "BLOCK_T": call.tokens,
        "BLOCK_N": call.tiling.rows,
        **lists.to_pack,
    }


def _grid(call: Call, lists: Lists) -> tuple[int, int]:
    """Programs for a list that is full; those beyond its end stop at once."""
    return (lists.num_tiles * (lists.tile // call.tiling.rows), call.token_tiles)


@triton.jit
def write_hidden_grads(
    hidden, d_gate_x, d_up_x, at_TN, on_N, gate_TN, up_TN, dh_TN, weight_TN, off_N,
    threshold, up_threshold,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Writes h and the gradients of gate x and up x, and returns that of the weight."""
    runs_TN = weight_TN != 0
    dtype = hidden.dtype.element_ty
    act_TN = activate(gate_TN, threshold, ACT)
    h_TN = act_TN
    d_gate_TN = dh_TN * slope(gate_TN, threshold, ACT)
    if GATED:
        factor_TN = activate(up_TN, up_threshold, UP_ACT)
        h_TN *= factor_TN
        d_gate_TN *= factor_TN
        d_up_TN = weight_TN * dh_TN * act_TN * slope(up_TN, up_threshold, UP_ACT)
        d_up_TN = tl.where(runs_TN, d_up_TN, 0.0)
        tl.store(d_up_x + at_TN, d_up_TN.to(dtype), mask=on_N[None, :])
    d_gate_TN = tl.where(runs_TN, weight_TN * d_gate_TN, 0.0)
    tl.store(d_gate_x + at_TN, d_gate_TN.to(dtype), mask=on_N[None, :])
    if off_N is not None:
        h_TN -= off_N[None, :]
    hidden_TN = tl.where(runs_TN, weight_TN * h_TN, 0.0)
    tl.store(hidden + at_TN, hidden_TN.to(dtype), mask=on_N[None, :])
    return tl.where(runs_TN, h_TN * dh_TN, 0.0)


@triton.jit
def compute_hidden_grads(
    x, dy, gate, gate_stride, gate_bias, up, up_stride, up_bias, down, down_stride, off, mask,
    hidden, d_gate_x, d_up_x, d_weight, neurons, counts, packed,
    T, D, F, E, group, skip, num_tiles, threshold, up_threshold,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes h, and the gradients of gate x, of up x, and of each neuron's weight."""
    tokens, tile, first, count = find_places(counts, num_tiles, BLOCK_N, TILE)
    if first >= count:
        return
    neuron_N, on_N = take_neurons(
        neurons, counts, packed, tokens, tile, first, count, num_tiles, F, BLOCK_N, TILE, TILES
    )  # fmt: skip
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    gate_TN, up_TN, dh_TN = project_TN(
        x, dy, gate, None, gate_stride, up, None, up_stride, down, down_stride, token_T,
        neuron_N, row_of(neuron_N, group, skip), on_N, T, D, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    gate_TN = with_bias_TN(gate_TN, gate_bias, neuron_N, on_N)
    up_TN = with_bias_TN(up_TN, up_bias, neuron_N, on_N)
    off_N = None if off is None else load_N(off, neuron_N, on_N)
    weight_TN = load_weight_TN(mask, token_T, neuron_N, on_N, T, F, E)
    d_weight_TN = write_hidden_grads(
        hidden, d_gate_x, d_up_x, neuron_major(tokens, neuron_N, F, BLOCK_T), on_N,
        gate_TN, up_TN, dh_TN, weight_TN, off_N, threshold, up_threshold, ACT, UP_ACT, GATED,
    )  # fmt: skip
    if d_weight is not None:
        to_TN = d_weight + neuron_major(tokens, neuron_N, F, BLOCK_T)
        tl.store(to_TN, d_weight_TN, mask=on_N[None, :])


def launch_hidden_grads(
    call: Call, lists: Lists, dy_TD: Tensor, values: HiddenGrads
) -> KernelLaunch:
    """The launch that writes `values`."""
    columns = call.tiling.columns
    arguments = {
        **_operands(call, lists),
        "dy": dy_TD,
        "gate": call.gate_FD,
        "down": call.down_FD,
        "down_stride": row_stride(call.down_FD),
        **values._asdict(),
        # With a third stream, one token, whose sums stand in registers, takes half the columns.
        "BLOCK_D": columns if call.tokens > 1 else max(1, columns // 2),
    }
    return KernelLaunch(compute_hidden_grads, _grid(call, lists), arguments, call.tiling.warps)
