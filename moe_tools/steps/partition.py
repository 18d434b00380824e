"""Which neurons share an expert: a permutation after which experts are contiguous slices.

Letters: F neurons, E experts, X feature dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.extras import needed
from moe_tools.steps.balance import balanced_assignment

LLOYD_ROUNDS = 20
STARTS = 3
"""Unbalanced clusterings that faiss tries; the best one is where to start."""


@dataclass(frozen=True)
class Partition:
    """Expert e is its slice of the `division` of the neurons, in the order `order_F`."""

    order_F: Tensor
    """New neuron i is old neuron order_F[i]."""
    num_experts: int

    def __post_init__(self) -> None:
        _ = self.division

    @property
    def division(self) -> Division:
        """The sizes of the experts."""
        return Division(len(self.order_F), self.num_experts)

    @classmethod
    def of_experts(cls, expert_F: Tensor, num_experts: int) -> Partition:
        """Neurons by their expert; inside an expert they keep the host's order."""
        return cls(expert_F.argsort(stable=True), num_experts)


def contiguous_partition(neurons: int, num_experts: int) -> Partition:
    """The host's own order: the control of every clustering."""
    return Partition(torch.arange(neurons), num_experts)


def random_partition(neurons: int, num_experts: int, seed: int) -> Partition:
    """A seeded random order."""
    generator = torch.Generator().manual_seed(seed)
    return Partition(torch.randperm(neurons, generator=generator), num_experts)


def kmeans_partition(features_FX: Tensor, num_experts: int, seed: int) -> Partition:
    """Balanced k-means: expert sizes differ by at most one.

    faiss finds starting centroids; then Lloyd's rounds alternate the cheapest balanced assignment
    and new centroids (MoEfication, arXiv 2110.01786).

    Raises:
        ValueError: more experts than neurons, or a feature is not finite.
    """
    division = Division(len(features_FX), num_experts)
    features = _scaled(features_FX.detach().float().cpu())
    if num_experts == len(features):
        return contiguous_partition(len(features), num_experts)
    centroids_EX = _faiss_centroids(features.numpy(), num_experts, seed)
    expert_F = None
    for _ in range(LLOYD_ROUNDS):
        cost_FE = centroids_EX.square().sum(1) - 2 * features @ centroids_EX.T
        moved_F = balanced_assignment(cost_FE, division.sizes, expert_F)
        if expert_F is not None and torch.equal(moved_F, expert_F):
            break
        expert_F = moved_F
        centroids_EX = _centroids(features, expert_F, division)
    assert expert_F is not None
    return Partition.of_experts(expert_F, num_experts)


def _scaled(features_FX: Tensor) -> Tensor:
    """Divided by a power of two, which is exact, to below 2: faiss aborts when squares overflow."""
    largest = float(features_FX.abs().max())
    if not math.isfinite(largest):
        raise ValueError("k-means got features that are not finite: does the donor overflow?")
    return (features_FX / 2.0 ** (math.frexp(largest)[1] - 1)).contiguous()


def _faiss_centroids(features: np.ndarray, num_experts: int, seed: int) -> Tensor:
    """Unbalanced k-means, only for where to start."""
    faiss = needed("faiss", "cluster", "k-means")
    kmeans = faiss.Kmeans(
        features.shape[1],
        num_experts,
        niter=10,
        nredo=STARTS,
        seed=seed + 1,  # faiss reads 0 as "no seed"
        min_points_per_centroid=1,
        max_points_per_centroid=len(features),
    )
    kmeans.train(features)
    return torch.from_numpy(kmeans.centroids)


def _centroids(features_FX: Tensor, expert_F: Tensor, division: Division) -> Tensor:
    sizes_E = torch.tensor(division.sizes)
    sums_EX = torch.zeros(len(sizes_E), features_FX.shape[1])
    return sums_EX.index_add(0, expert_F, features_FX) / sizes_E[:, None]
