"""Third launch: y = sum over the listed neurons of h times the neuron's row.

The list is cut into SPLITS shares for each tile of columns. Each program leaves its fp32 sum in
its own place and takes a ticket; whoever takes the last one adds the sums in the order of the
shares. The order is fixed, so y is the same from run to run, and no fourth launch is needed. On
AMD it is: there a barrier does not wait for the stores of the other waves of a program, and only
the end of a launch does.

Letters: T tokens of one tile, D columns of one tile, N neurons of one step, F neurons.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import next_power
from moe_tools.kernels.triton.device import neuron_major
from moe_tools.kernels.triton.hidden import HiddenGrads, count_before
from moe_tools.kernels.triton.kernel_launch import KernelLaunch, row_stride
from moe_tools.kernels.triton.lists import Lists
from moe_tools.kernels.triton.rows import load_rows_ND, row_of


@triton.jit
def add_rows(
    sums, hidden, rows, scale, stride, tokens, neuron_N, row_N, on_N, start, D, F,
    SKIP_ZEROS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns sums + hidden rows; SKIP_ZEROS reads no row whose hidden values are all zero."""
    from_TN = hidden + neuron_major(tokens, neuron_N, F, BLOCK_T)
    hidden_TN = tl.load(from_TN, mask=on_N[None, :], other=0.0)
    reads_N = on_N
    if SKIP_ZEROS:
        reads_N = tl.max((hidden_TN != 0).to(tl.int32), 0) > 0
    rows_ND = load_rows_ND(rows, scale, stride, row_N, reads_N, start, D, BLOCK_D, 0.0)
    return add_weighted(sums, hidden_TN, rows_ND, BLOCK_T)


@triton.jit
def add_weighted(sums, weight_TN, rows_ND, BLOCK_T: tl.constexpr):
    """Returns sums + weight rows: fused multiply-adds for one token, matrix units for more."""
    if BLOCK_T == 1:
        return sums + tl.trans(weight_TN).to(tl.float32) * rows_ND.to(tl.float32)
    else:
        return tl.dot(weight_TN, rows_ND.to(weight_TN.dtype), sums, input_precision="ieee")


@triton.jit
def sum_share_TD(
    hidden, rows, scale, stride, hidden_2, rows_2, stride_2, packed, first, stop, tokens, start,
    D, F, group, skip,
    SKIP_ZEROS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds up the places from `first` to `stop` of the packed list, from column `start` on."""
    if BLOCK_T == 1:
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for place in range(first, stop, BLOCK_N):
        place_N = place + tl.arange(0, BLOCK_N)
        on_N = place_N < stop
        neuron_N = tl.load(packed + tokens * F + place_N, mask=on_N, other=0)
        row_N = row_of(neuron_N, group, skip)
        sums = add_rows(
            sums, hidden, rows, scale, stride, tokens, neuron_N, row_N, on_N, start, D, F,
            SKIP_ZEROS, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        if rows_2 is not None:
            sums = add_rows(
                sums, hidden_2, rows_2, None, stride_2, tokens, neuron_N, row_N, on_N, start, D, F,
                SKIP_ZEROS, BLOCK_T, BLOCK_D,
            )  # fmt: skip
    if BLOCK_T == 1:
        return tl.sum(sums, axis=0)[None, :]
    else:
        return sums


@triton.jit
def places_TD(partials, tokens, column_D, D, PLACES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Points to the first of the places of a tile; the next is BLOCK_T * D further."""
    row_T = tokens * PLACES * BLOCK_T + tl.arange(0, BLOCK_T)
    return partials + row_T[:, None].to(tl.int64) * D + column_D[None, :]


@triton.jit
def add_places(
    first_TD, bias, residual, y, tokens, column_D, T, D,
    PLACES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Writes y = bias + the sums of all places, in their order, and then the residual, if any."""
    inside_D = column_D < D
    y_TD = tl.zeros(first_TD.shape, tl.float32)
    if bias is not None:
        y_TD += tl.load(bias + column_D, mask=inside_D, other=0.0).to(tl.float32)[None, :]
    for place in range(PLACES):
        # ".cg": past the first cache, which may hold lines from before the ticket
        from_TD = first_TD + place * BLOCK_T * D
        y_TD += tl.load(from_TD, mask=inside_D[None, :], other=0.0, cache_modifier=".cg")
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    to_TD = y + token_T[:, None].to(tl.int64) * D + column_D[None, :]
    inside_TD = (token_T < T)[:, None] & inside_D[None, :]
    if residual is not None:  # y is rounded before, as where PyTorch adds the two
        from_TD = residual + token_T[:, None].to(tl.int64) * D + column_D[None, :]
        residual_TD = tl.load(from_TD, mask=inside_TD, other=0.0).to(tl.float32)
        y_TD = residual_TD + y_TD.to(y.dtype.element_ty).to(tl.float32)
    tl.store(to_TD, y_TD.to(y.dtype.element_ty), mask=inside_TD)


@triton.jit
def combine(
    hidden, rows, scale, stride, hidden_2, rows_2, stride_2, packed, counts, bias, residual,
    partials, tickets, y, T, D, F, group, skip, num_tiles,
    ATOMIC: tl.constexpr, TICKETS: tl.constexpr, SKIP_ZEROS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes y_TD = bias + hidden rows + residual; backward, the sum of gate's and up's rows.

    ATOMIC adds every share to one place, which must start at zero: less to write, but the order
    of the sums, and so their last bit, may change from run to run. Without TICKETS, `add_shares`
    has to follow.
    """
    tile, split, tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column_D = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    count = count_before(counts, tokens, num_tiles, num_tiles, TILES)
    share = tl.cdiv(count, SPLITS)
    first = split * share
    stop = tl.minimum(first + share, count)
    sums_TD = sum_share_TD(
        hidden, rows, scale, stride, hidden_2, rows_2, stride_2, packed, first, stop, tokens,
        tile * BLOCK_D, D, F, group, skip, SKIP_ZEROS, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    places: tl.constexpr = 1 if ATOMIC else SPLITS
    first_TD = places_TD(partials, tokens, column_D, D, places, BLOCK_T)
    inside_TD = tl.broadcast_to((column_D < D)[None, :], (BLOCK_T, BLOCK_D))
    if ATOMIC:
        tl.atomic_add(first_TD, sums_TD, mask=inside_TD, sem="relaxed")
    else:
        tl.store(first_TD + split * BLOCK_T * D, sums_TD, mask=inside_TD)
    if TICKETS:
        # The barrier puts every thread's sums before the ticket; the ticket, released and
        # acquired by one thread, puts them before the loads of whoever comes last.
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + tokens * tl.num_programs(0) + tile, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            tl.debug_barrier()
            add_places(first_TD, bias, residual, y, tokens, column_D, T, D, places, BLOCK_T)


@triton.jit
def add_shares(
    partials, bias, residual, y, T, D,
    PLACES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes y as the last ticket of `combine` does, in a launch of its own."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = tl.program_id(1)
    first_TD = places_TD(partials, tokens, column_D, D, PLACES, BLOCK_T)
    add_places(first_TD, bias, residual, y, tokens, column_D, T, D, PLACES, BLOCK_T)


def launch_combine(call: Call, lists: Lists, hidden: Tensor, y_TD: Tensor) -> list[KernelLaunch]:
    """The launches that write y from h, the rows of down and the residual."""
    streams = {
        "hidden": hidden,
        "rows": call.down_FD,
        "scale": call.down_scale_FG,
        "stride": row_stride(call.down_FD),
        "hidden_2": None,
        "rows_2": None,
        "stride_2": 0,
        "group": call.neurons,  # the rows of down follow each other
        "skip": 0,
        "SKIP_ZEROS": call.skips_zeros,
    }
    return _launches(call, lists, y_TD, call.down_D, call.residual_TD, streams)


def launch_combine_grads(
    call: Call, lists: Lists, values: HiddenGrads, dx_TD: Tensor
) -> list[KernelLaunch]:
    """The launches that write dx from the gradients of gate x and up x and their rows."""
    streams = {
        "hidden": values.d_gate_x,
        "rows": call.gate_FD,
        "scale": None,
        "stride": row_stride(call.gate_FD),
        "hidden_2": values.d_up_x,
        "rows_2": call.up_FD,
        "stride_2": row_stride(call.up_FD),
        **call.grouping,
        "SKIP_ZEROS": False,
    }
    return _launches(call, lists, dx_TD, None, None, streams)


def _launches(
    call: Call,
    lists: Lists,
    y_TD: Tensor,
    bias_D: Tensor | None,
    residual_TD: Tensor | None,
    streams: dict[str, Any],
) -> list[KernelLaunch]:
    """`combine`, and `add_shares` where it is needed; `streams` are what is summed, by name."""
    splits, width = call.tiling.splits, y_TD.shape[1]
    places, make = (1, torch.zeros) if call.atomic else (splits, torch.empty)
    shape = (call.token_tiles, places, call.tokens, width)
    sums = {
        "partials": make(shape, dtype=torch.float32, device=y_TD.device),
        "bias": bias_D,
        "residual": residual_TD,
        "y": y_TD,
        "T": len(y_TD),
        "D": width,
        "BLOCK_T": call.tokens,
        "BLOCK_D": call.tiling.down_columns,
    }
    arguments = {
        **sums,
        **streams,
        "packed": lists.packed,
        "counts": lists.counts,
        "tickets": lists.tickets,
        "F": call.neurons,
        "num_tiles": lists.num_tiles,
        "TILES": next_power(lists.num_tiles),
        "ATOMIC": call.atomic,
        "TICKETS": call.tickets,
        "SPLITS": splits,
        "BLOCK_N": call.tiling.down_rows,
    }
    warps, grid = call.tiling.warps, (lists.num_columns, splits, call.token_tiles)
    launches = [KernelLaunch(combine, grid, arguments, warps, call.stages)]
    if not call.tickets:
        grid_of_sums = (lists.num_columns, call.token_tiles)
        launches.append(KernelLaunch(add_shares, grid_of_sums, {**sums, "PLACES": places}, warps))
    return launches
