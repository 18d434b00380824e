"""Many tokens, grouped by the expert that they chose: hidden values, then one sum for each pair.

A pair is a token and one of its K experts. The pairs of an expert are listed on the device and cut
into tiles; a program finds its tile, and whose it is, in the counts. The grid has room for the most
tiles that the pairs can make, and programs beyond the last stop at once: the host reads nothing.

Letters: T tokens of one tile, D columns of one step, N neurons of one step (also: of one expert),
X experts, P pairs, K pairs of one token.
"""

from typing import Any, NamedTuple, Self

import triton
import triton.language as tl
from torch import Tensor, int32

from moe_tools.kernels.triton.combine import add_rows
from moe_tools.kernels.triton.device import activate, neuron_major, project_TN
from moe_tools.kernels.triton.grouped_call import GroupedCall
from moe_tools.kernels.triton.kernel_launch import KernelLaunch

STEP = 1024
"""How many pairs `group_pairs` looks at in one step."""


class Pairs(NamedTuple):
    """The list of each expert's pairs, and how many they are."""

    pairs: Tensor
    counts: Tensor

    @classmethod
    def blank(cls, call: GroupedCall) -> Self:
        """Memory for the lists of a call."""
        experts, tokens = len(call.gate_XND), len(call.x_TD)
        return cls(
            pairs=call.empty(experts, tokens, dtype=int32), counts=call.empty(experts, dtype=int32)
        )


def expert_rows(name: str, weight_XND: Tensor) -> dict[str, Any]:
    """The arguments that say where an expert's rows are, for the weight called `name`."""
    expert, row, _ = weight_XND.stride()
    return {name: weight_XND, f"{name}_stride": row, f"{name}_expert": expert}


@triton.jit
def group_pairs(chosen, pairs, counts, T, P, STEP: tl.constexpr):
    """Lists the pairs of one expert, in their order, in its own T places, and counts them."""
    expert = tl.program_id(0)
    count = tl.full((), 0, tl.int32)
    for start in range(0, P, STEP):
        pair_P = start + tl.arange(0, STEP)
        mine_P = tl.load(chosen + pair_P, mask=pair_P < P, other=-1) == expert
        place_P = count + tl.cumsum(mine_P.to(tl.int32), 0) - 1
        # no token chooses an expert twice; one that does must not write into the next one's places
        tl.store(pairs + expert * T + place_P, pair_P, mask=mine_P & (place_P < T))
        count += tl.sum(mine_P.to(tl.int32))
    tl.store(counts + expert, tl.minimum(count, T))


def launch_group_pairs(call: GroupedCall, pairs: Pairs) -> KernelLaunch:
    """The launch that writes `pairs`."""
    arguments = {
        "chosen": call.chosen_TK,
        **pairs._asdict(),
        "T": len(call.x_TD),
        "P": call.num_pairs,
        "STEP": STEP,
    }
    return KernelLaunch(group_pairs, (len(call.gate_XND),), arguments, call.tiling.warps)


@triton.jit
def pairs_of(pairs, expert, first, count, T, P, BLOCK_T: tl.constexpr):
    """Loads BLOCK_T pairs of an expert's list; P behind its end."""
    place_T = first + tl.arange(0, BLOCK_T)
    return tl.load(pairs + expert * T + place_T, mask=place_T < count, other=P)


@triton.jit
def find_pairs(
    pairs, counts, tile, T, X, P, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """Finds a tile's expert, which is X or more behind the last tile, and its pairs."""
    expert_X = tl.arange(0, EXPERTS)
    count_X = tl.load(counts + expert_X, mask=expert_X < X, other=0)
    end_X = tl.cumsum(tl.cdiv(count_X, BLOCK_T), 0)
    before_X = end_X <= tile
    expert = tl.sum(before_X.to(tl.int32))
    first = (tile - tl.max(tl.where(before_X, end_X, 0))) * BLOCK_T
    count = tl.sum(tl.where(expert_X == expert, count_X, 0))
    return expert, pairs_of(pairs, expert, first, count, T, P, BLOCK_T)


@triton.jit
def find_expert(counts, expert, X, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr):
    """Finds an expert's first tile, the first that is another's, and how many pairs it has."""
    expert_X = tl.arange(0, EXPERTS)
    count_X = tl.load(counts + expert_X, mask=expert_X < X, other=0)
    end_X = tl.cumsum(tl.cdiv(count_X, BLOCK_T), 0)
    end = tl.sum(tl.where(expert_X == expert, end_X, 0))
    count = tl.sum(tl.where(expert_X == expert, count_X, 0))
    return end - tl.cdiv(count, BLOCK_T), end, count


@triton.jit
def rows_of(weight, expert, expert_stride):
    """Returns where the rows of an expert begin."""
    return weight + expert.to(tl.int64) * expert_stride


@triton.jit
def load_weight_T(weight, pair_T, P):
    """Loads the weight that the router gives each pair."""
    return tl.load(weight + pair_T, mask=pair_T < P, other=0.0).to(tl.float32)


@triton.jit
def compute_pairs_hidden(
    x, gate, up, gate_stride, up_stride, gate_expert, up_expert, weight, hidden, pairs, counts,
    T, D, N, X, P, K, threshold, up_threshold,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes h = weight * act(gate x) * up_act(up x) of BLOCK_N neurons for a tile of pairs."""
    tile = tl.program_id(1)
    expert, pair_T = find_pairs(pairs, counts, tile, T, X, P, BLOCK_T, EXPERTS)
    if expert >= X:
        return
    neuron_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    on_N = neuron_N < N
    gate_TN, up_TN, _ = project_TN(
        x, None, rows_of(gate, expert, gate_expert), None, gate_stride,
        rows_of(up, expert, up_expert), None, up_stride, None, 0,
        pair_T // K, neuron_N, neuron_N, on_N, T, D, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    hidden_TN = activate(gate_TN, threshold, ACT) * activate(up_TN, up_threshold, UP_ACT)
    hidden_TN *= load_weight_T(weight, pair_T, P)[:, None]
    to_TN = hidden + neuron_major(tile, neuron_N, N, BLOCK_T)
    tl.store(to_TN, hidden_TN.to(hidden.dtype.element_ty), mask=on_N[None, :])


def launch_pairs_hidden(call: GroupedCall, pairs: Pairs, hidden: Tensor) -> KernelLaunch:
    """The launch that writes h."""
    arguments = {
        **call.sizes,
        **call.activation,
        **pairs._asdict(),
        **expert_rows("gate", call.gate_XND),
        **expert_rows("up", call.up_XND),
        "x": call.x_TD,
        "weight": call.weight_TK,
        "K": call.chosen_TK.shape[1],
        "hidden": hidden,
        "BLOCK_N": call.tiling.rows,
        "BLOCK_D": call.tiling.columns,
    }
    grid = (call.blocks, call.tiles)
    return KernelLaunch(compute_pairs_hidden, grid, arguments, call.tiling.warps)


@triton.jit
def combine_pairs(
    hidden, rows, stride, rows_expert, hidden_2, rows_2, stride_2, rows_2_expert, y, pairs, counts,
    T, D, N, X, P,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes what each pair of a tile adds to its token, at the pair's own place: no atomics."""
    tile = tl.program_id(1)
    expert, pair_T = find_pairs(pairs, counts, tile, T, X, P, BLOCK_T, EXPERTS)
    if expert >= X:
        return
    start = tl.program_id(0) * BLOCK_D
    column_D = start + tl.arange(0, BLOCK_D)
    sums_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        neuron_N = first + tl.arange(0, BLOCK_N)
        sums_TD = add_rows(
            sums_TD, hidden, rows_of(rows, expert, rows_expert), None, stride, tile, neuron_N,
            neuron_N, neuron_N < N, start, D, N, False, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        if rows_2 is not None:
            sums_TD = add_rows(
                sums_TD, hidden_2, rows_of(rows_2, expert, rows_2_expert), None, stride_2, tile,
                neuron_N, neuron_N, neuron_N < N, start, D, N, False, BLOCK_T, BLOCK_D,
            )  # fmt: skip
    to_TD = y + pair_T[:, None].to(tl.int64) * D + column_D[None, :]
    tl.store(to_TD, sums_TD, mask=(pair_T < P)[:, None] & (column_D < D)[None, :])


def launch_combine_pairs(
    call: GroupedCall, pairs: Pairs, hidden: Tensor, y_PD: Tensor
) -> KernelLaunch:
    """The launch that writes y of each pair from h and the rows of down."""
    streams = {
        "hidden": hidden,
        "rows": call.down_XND,
        "stride": call.down_XND.stride(1),
        "rows_expert": call.down_XND.stride(0),
        "hidden_2": None,
        "rows_2": None,
        "stride_2": 0,
        "rows_2_expert": 0,
    }
    return sum_pairs(call, pairs, streams, y_PD)


def sum_pairs(
    call: GroupedCall, pairs: Pairs, streams: dict[str, Any], y_PD: Tensor
) -> KernelLaunch:
    """The launch of `combine_pairs`; `streams` are what is summed, by name."""
    columns = call.tiling.down_columns
    arguments = {
        **call.sizes,
        **pairs._asdict(),
        **streams,
        "y": y_PD,
        "BLOCK_N": call.tiling.down_rows,
        "BLOCK_D": columns,
    }
    grid = (-(-y_PD.shape[1] // columns), call.tiles)
    return KernelLaunch(combine_pairs, grid, arguments, call.tiling.warps)
