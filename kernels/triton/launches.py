"""The launches of each pass, in their order.

They follow from shapes alone, never from values. So the host never waits for the device, a CUDA
graph can capture them, and tensors without data (device "meta") make launches too, which
`tools/resources.py` compiles and the tests count.

Letters: T tokens, D model width, F neurons, P pairs of a token and one of its experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.kernels.scores import FewBitScores, LinearScores, Scores
from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.combine import launch_combine, launch_combine_grads
from moe_tools.kernels.triton.gradients import Gradients, launch_mask_grads, launch_weight_grads
from moe_tools.kernels.triton.grouped import (
    Pairs,
    launch_combine_pairs,
    launch_group_pairs,
    launch_pairs_hidden,
)
from moe_tools.kernels.triton.grouped_call import GroupedCall
from moe_tools.kernels.triton.grouped_gradients import (
    GroupedGradients,
    PairsGrads,
    launch_combine_pairs_grads,
    launch_experts_grads,
    launch_pairs_hidden_grads,
)
from moe_tools.kernels.triton.hidden import HiddenGrads, launch_hidden, launch_hidden_grads
from moe_tools.kernels.triton.kernel_launch import KernelLaunch
from moe_tools.kernels.triton.lists import Lists, launch_list_experts, launch_list_firing
from moe_tools.kernels.triton.proposed import launch_list_proposed
from moe_tools.kernels.triton.routed import blank_lists, launch_list_routed


def forward_launches(call: Call, scores: Scores | None = None) -> tuple[list[KernelLaunch], Tensor]:
    """Three launches, and the y_TD that they write: list the neurons, compute h, combine the rows.

    A fourth adds the shares where launch three does not (`Call.tickets`).

    Args:
        call: the FFN and its input.
        scores: what selects, in place of the call's mask.
    """
    gates = call.values(torch.float32) if call.gate_first and scores is None else None
    if isinstance(scores, LinearScores):
        call, lists = call.with_mask(scores.experts), blank_lists(scores, call)
        first = launch_list_routed(call, scores, lists, call.written_TE)
    elif isinstance(scores, FewBitScores):
        call, lists = call.with_mask(call.neurons), Lists.blank(call, call.tiling.gate_tile)
        first = launch_list_proposed(call, scores, lists, call.written_TE)
    elif gates is not None:
        lists = Lists.blank(call, call.tiling.gate_tile)
        first = launch_list_firing(call, lists, gates)
    else:
        lists = Lists.blank(call, call.tiling.tile)
        first = launch_list_experts(call, lists)
    hidden, y_TD = call.values(), torch.empty_like(call.x_TD)
    launches = [
        first,
        launch_hidden(call, lists, gates, hidden),
        *launch_combine(call, lists, hidden, y_TD),
    ]
    return launches, y_TD


def backward_launches(call: Call, dy_TD: Tensor) -> tuple[list[KernelLaunch], Gradients]:
    """Four launches, five with a mask that learns (and `add_shares`), and what they write.

    The list is made again and h is computed again: nothing but the operands is kept for it.
    """
    lists = Lists.blank(call, call.tiling.tile)
    values, made = HiddenGrads.blank(call), Gradients.blank(call)
    launches = [
        launch_list_experts(call, lists),
        launch_hidden_grads(call, lists, dy_TD, values),
        *launch_combine_grads(call, lists, values, made.x_TD),
        launch_weight_grads(call, dy_TD, values, made),
    ]
    if call.learns_mask:
        launches.append(launch_mask_grads(call, values, made))
    return launches, made


def grouped_launches(call: GroupedCall) -> tuple[list[KernelLaunch], Tensor]:
    """Three launches, and the y_PD that they write, in fp32: what each pair adds to its token."""
    pairs, hidden, y_PD = Pairs.blank(call), call.values(), call.by_pair()
    launches = [
        launch_group_pairs(call, pairs),
        launch_pairs_hidden(call, pairs, hidden),
        launch_combine_pairs(call, pairs, hidden, y_PD),
    ]
    return launches, y_PD


def grouped_backward_launches(
    call: GroupedCall, dy_TD: Tensor
) -> tuple[list[KernelLaunch], GroupedGradients]:
    """Four launches, and what they write; h is computed again."""
    pairs, values, made = Pairs.blank(call), PairsGrads.blank(call), GroupedGradients.blank(call)
    launches = [
        launch_group_pairs(call, pairs),
        launch_pairs_hidden_grads(call, pairs, dy_TD, values, made),
        launch_combine_pairs_grads(call, pairs, values, made),
        launch_experts_grads(call, pairs, dy_TD, values, made),
    ]
    return launches, made
