"""Split: decide which neurons share an expert and make experts contiguous. Changes no output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_tools.model.ffn import FFN, find_ffns, permute_neurons
from moe_tools.model.partition import (
    Partition,
    contiguous_partition,
    experts_of_size,
    kmeans_partition,
    random_partition,
)
from moe_tools.recipe import Split
from moe_tools.steps.calibrate import visit_activations


def split(model: nn.Module, step: Split, blocks_BT: Tensor, seed: int) -> list[Partition]:
    """Reorders the neurons of every FFN in place and returns the partitions, in FFN order.

    Raises:
        ValueError: the expert size does not divide an FFN's neurons.
    """
    ffns = find_ffns(model)
    counts = [experts_of_size(len(f.weights().up_FD), step.expert_size, f.name) for f in ffns]
    features = _features(model, ffns, step, blocks_BT)
    partitions = []
    for index, ffn in enumerate(tqdm(ffns, desc="split", disable=None)):
        partition = _partition(ffn, counts[index], step, features.pop(0), seed)
        permute_neurons(ffn, partition.order_F)
        partitions.append(partition)
    return partitions


def _partition(
    ffn: FFN, num_experts: int, step: Split, features_FX: Tensor | None, seed: int
) -> Partition:
    neurons = len(ffn.weights().up_FD)
    if step.method == "contiguous":
        return contiguous_partition(neurons, num_experts)
    if step.method == "random":
        return random_partition(neurons, num_experts, seed)
    assert features_FX is not None
    return kmeans_partition(features_FX, num_experts, seed)


def _features(
    model: nn.Module, ffns: list[FFN], step: Split, blocks_BT: Tensor
) -> list[Tensor | None]:
    """What k-means compares, a neuron a row."""
    if step.method != "kmeans":
        return [None] * len(ffns)
    if step.on == "weights":  # MoEfication: L2-normalised rows, arXiv 2110.01786
        return [nn.functional.normalize(f.weights().routing_FD.detach().float()) for f in ffns]
    seen: list[list[Tensor]] = [[] for _ in ffns]

    def visit(index: int, _: Tensor, h_TF: Tensor) -> None:
        contribution_TF = h_TF.float().abs() * ffns[index].weights().down_norm_F
        seen[index].append(contribution_TF.to(torch.bfloat16))

    visit_activations(model, blocks_BT, visit, title="calibrate split")
    return [_rows(batches, ffn) for batches, ffn in zip(seen, ffns, strict=True)]


def _rows(batches: list[Tensor], ffn: FFN) -> Tensor:
    if not batches:
        raise ValueError(f"{ffn.name} saw no calibration token: give more calibration tokens")
    return torch.cat(batches).T.float()
