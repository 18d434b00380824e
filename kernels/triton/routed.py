"""First launch with a linear router: scores, threshold and list of neurons in one.

A program owns a few experts. It scores them for its tokens, writes their part of the mask, which
later launches read, and lists the neurons of those that any token selects.

Letters: T tokens of one tile, K numbers that a score takes, E experts, R experts that are routed,
N neurons of one program's experts, F neurons.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from moe_tools.kernels.scores import LinearScores
from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import next_power
from moe_tools.kernels.triton.device import (
    add_product,
    expert_of,
    load_N,
    load_x_TD,
    no_sums,
    product_TN,
    sigmoid,
)
from moe_tools.kernels.triton.kernel_launch import KernelLaunch
from moe_tools.kernels.triton.lists import Lists, write_tile
from moe_tools.kernels.triton.rows import load_rows_ND

PROGRAMS = 128
"""About as many as a large card runs at once: with fewer experts, each program owns fewer."""
ONE_TOGETHER, MANY_TOGETHER = 8, 16
"""Experts of a program: for one token the most with pinned tiles, for more what products need."""
MOST_NEURONS = 4096
"""Places of one tile: the neurons of a program's experts have to fit into its registers."""


def fits(scores: LinearScores, neurons: int, tokens: int) -> bool:
    """Whether the neurons of the most experts that a program owns fit into one tile."""
    together = MANY_TOGETHER if tokens > 1 else ONE_TOGETHER
    return together * -(-neurons // scores.experts) <= MOST_NEURONS


def experts_together(scores: LinearScores, call: Call) -> int:
    """How many experts one program owns."""
    if call.tokens > 1:
        return MANY_TOGETHER
    return max(2, min(call.tiling.rows, next_power(scores.experts // PROGRAMS)))


def blank_lists(scores: LinearScores, call: Call) -> Lists:
    """Memory for the lists: a tile has places for the neurons of one program's experts."""
    together = experts_together(scores, call)
    largest = -(-call.neurons // scores.experts)
    tile = max(call.tiling.rows, next_power(largest * together))
    return Lists.blank(call, tile, -(-scores.experts // together))


@triton.jit
def start_of(expert, F, E):
    """Finds the first neuron of an expert; F behind the last."""
    return tl.minimum(expert * (F // E) + tl.minimum(expert, F % E), F)


@triton.jit
def list_routed(
    z, weight, bias, mask, neurons, counts, tickets, T, K, F, E, shared, above, num_columns,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the mask of BLOCK_E experts and lists their neurons that some token selects."""
    tile, tokens = tl.program_id(0), tl.program_id(1)
    expert_E = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    routed_E = (expert_E >= shared) & (expert_E < E)
    sums = no_sums(BLOCK_T, BLOCK_E, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        z_TK = load_x_TD(z, token_T, start + tl.arange(0, BLOCK_K), T, K).to(tl.float32)
        rows_EK = load_rows_ND(
            weight, None, K, expert_E - shared, routed_E, start, K, BLOCK_K, 0.0
        )  # fmt: skip
        sums = add_product(sums, z_TK, rows_EK, BLOCK_T)
    logits_TE = product_TN(sums, BLOCK_T)
    if bias is not None:
        logits_TE += load_N(bias, expert_E - shared, routed_E)[None, :]
    on_TE = routed_E[None, :] & (sigmoid(logits_TE) > above) | (expert_E < shared)[None, :]
    inside_TE = (token_T < T)[:, None] & (expert_E < E)[None, :]
    to_TE = mask + token_T[:, None].to(tl.int64) * E + expert_E[None, :]
    tl.store(to_TE, on_TE.to(tl.uint8), mask=inside_TE)
    on_E = tl.max((on_TE & inside_TE).to(tl.int32), 0)
    first, stop = start_of(tile * BLOCK_E, F, E), start_of((tile + 1) * BLOCK_E, F, E)
    neuron_N = first + tl.arange(0, TILE)
    expert_N = expert_of(neuron_N, F, E) - tile * BLOCK_E
    on_N = tl.zeros((TILE,), tl.int32)
    for expert in tl.static_range(BLOCK_E):
        on = tl.sum(tl.where(tl.arange(0, BLOCK_E) == expert, on_E, 0))
        on_N = tl.where(expert_N == expert, on, on_N)
    write_tile(
        neurons, counts, tickets, neuron_N, (on_N > 0) & (neuron_N < stop), tile, tokens,
        num_columns, TILE, COLUMNS,
    )  # fmt: skip


def launch_list_routed(
    call: Call, scores: LinearScores, lists: Lists, mask_TE: Tensor
) -> KernelLaunch:
    """The launch that writes `mask_TE` and lists the neurons of the experts that it selects."""
    together, numbers = experts_together(scores, call), scores.z_TK.shape[1]
    # The fewer rows a program has, the more columns: each thread is to load 16 bytes.
    tiling = replace(call.tiling, columns=2048 // together)
    arguments = {
        "z": scores.z_TK,
        "weight": scores.weight_RK,
        "bias": scores.bias_R,
        "mask": mask_TE,
        "K": numbers,
        **call.mask_sizes,
        "E": scores.experts,
        "shared": scores.shared,
        "above": scores.above,
        "BLOCK_T": call.tokens,
        "BLOCK_E": together,
        "BLOCK_K": tiling.fitted(call.tokens, numbers).columns,
        **lists.to_write,
    }
    grid = (lists.num_tiles, call.token_tiles)
    return KernelLaunch(list_routed, grid, arguments, tiling.warps, stages=1)
