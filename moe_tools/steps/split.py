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

SKETCH = 256
"""Dimensions of what k-means sees of a neuron."""


def split(model: nn.Module, step: Split, blocks_BT: Tensor, seed: int) -> list[Partition]:
    """Reorders the neurons of every FFN in place and returns the partitions, in FFN order.

    Raises:
        ValueError: the expert size does not divide an FFN's neurons.
    """
    ffns = find_ffns(model)
    counts = [experts_of_size(len(f.weights().up_FD), step.expert_size, f.name) for f in ffns]
    features = _features(model, ffns, step, blocks_BT, seed)
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
    model: nn.Module, ffns: list[FFN], step: Split, blocks_BT: Tensor, seed: int
) -> list[Tensor | None]:
    """What k-means compares, a neuron a row."""
    if step.method != "kmeans":
        return [None] * len(ffns)
    if step.by == "weights":  # MoEfication: L2-normalised rows, arXiv 2110.01786
        return [nn.functional.normalize(f.weights().routing_FD.detach().float()) for f in ffns]
    sketches = [_Sketch(ffn, seed) for ffn in ffns]

    def visit(index: int, _: Tensor, h_TF: Tensor) -> None:
        sketches[index].add(h_TF)

    visit_activations(model, blocks_BT, visit, title="calibrate split")
    return [sketch.rows() for sketch in sketches]


class _Sketch:
    """|h| ||w_down|| of each neuron over all tokens, projected at random to few dimensions.

    A Gaussian projection keeps distances (Johnson and Lindenstrauss, 1984), so k-means sees the
    same clusters, memory does not grow with the tokens, and 192 experts take a tenth of the time.
    """

    def __init__(self, ffn: FFN, seed: int) -> None:
        self.down_norm_F = ffn.weights().down_norm_F
        self.rows_FX = self.down_norm_F.new_zeros(len(self.down_norm_F), SKETCH)
        self.random = torch.Generator().manual_seed(seed)
        self.tokens = 0

    def add(self, h_TF: Tensor) -> None:
        contribution_TF = h_TF.float().abs() * self.down_norm_F
        project_TX = torch.randn(len(h_TF), SKETCH, generator=self.random).to(h_TF.device)
        self.rows_FX += contribution_TF.T @ project_TX
        self.tokens += len(h_TF)

    def rows(self) -> Tensor:
        return self.rows_FX / (self.tokens * SKETCH) ** 0.5
