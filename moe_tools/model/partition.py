"""Which neurons share an expert: a permutation after which experts are contiguous slices.

Letters: F neurons, E experts, N = F / E neurons of one expert, X feature dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

LLOYD_ROUNDS = 10


@dataclass(frozen=True)
class Partition:
    """Expert e is the slice [e N, (e + 1) N) of the neurons in the order `order_F`."""

    order_F: Tensor
    """New neuron i is old neuron order_F[i]."""
    num_experts: int

    def __post_init__(self) -> None:
        check_division(len(self.order_F), self.num_experts)


def check_division(neurons: int, num_experts: int, name: str = "the FFN") -> None:
    """Experts are all of one size.

    Raises:
        ValueError: the experts do not divide the neurons; names the nearest counts that do.
    """
    if num_experts >= 1 and neurons % num_experts == 0:
        return
    divisors = [count for count in range(1, neurons + 1) if neurons % count == 0]
    below = [str(count) for count in divisors if count < num_experts][-1:]
    above = [str(count) for count in divisors if count > num_experts][:1]
    raise ValueError(
        f"{name} has {neurons} neurons, which {num_experts} experts do not divide; "
        f"nearest: {', '.join(below + above)}"
    )


def experts_of_size(neurons: int, expert_size: int, name: str = "the FFN") -> int:
    """How many experts of `expert_size` neurons there are.

    Raises:
        ValueError: the size does not divide the neurons; names the nearest sizes that do.
    """
    if expert_size >= 1 and neurons % expert_size == 0:
        return neurons // expert_size
    sizes = [size for size in range(1, neurons + 1) if neurons % size == 0]
    nearest = sorted(sizes, key=lambda size: abs(size - expert_size))[:2]
    raise ValueError(
        f"{name} has {neurons} neurons, which experts of {expert_size} do not divide; "
        f"nearest sizes: {', '.join(map(str, sorted(nearest)))}"
    )


def contiguous_partition(neurons: int, num_experts: int) -> Partition:
    """The host's own order: the control of every clustering."""
    return Partition(torch.arange(neurons), num_experts)


def random_partition(neurons: int, num_experts: int, seed: int) -> Partition:
    """A seeded random order."""
    generator = torch.Generator().manual_seed(seed)
    return Partition(torch.randperm(neurons, generator=generator), num_experts)


def kmeans_partition(features_FX: Tensor, num_experts: int, seed: int) -> Partition:
    """Balanced k-means: every expert gets exactly N neurons.

    faiss finds starting centroids; then Lloyd's rounds alternate a balanced assignment and new
    centroids (as in MoEfication, arXiv 2110.01786).

    Raises:
        ValueError: the experts do not divide the neurons, or a feature is not finite.
    """
    check_division(len(features_FX), num_experts)
    features = _scaled(features_FX.detach().float().cpu())
    size = len(features) // num_experts
    if size == 1:
        return contiguous_partition(len(features), num_experts)
    centroids_EX = _faiss_centroids(features.numpy(), num_experts, seed)
    expert_F = _balanced_assignment(features, centroids_EX, size)
    for _ in range(LLOYD_ROUNDS):
        centroids_EX = _centroids(features, expert_F, num_experts)
        moved_F = _balanced_assignment(features, centroids_EX, size)
        if torch.equal(moved_F, expert_F):
            break
        expert_F = moved_F
    return Partition(expert_F.argsort(stable=True), num_experts)


def _scaled(features_FX: Tensor) -> Tensor:
    """Divided by a power of two, which is exact, to below 2: faiss aborts when squares overflow."""
    largest = float(features_FX.abs().max())
    if not math.isfinite(largest):
        raise ValueError("k-means got features that are not finite: does the donor overflow?")
    return (features_FX / 2.0 ** (math.frexp(largest)[1] - 1)).contiguous()


def _faiss_centroids(features: np.ndarray, num_experts: int, seed: int) -> Tensor:
    """Unbalanced k-means, only for where to start."""
    kmeans = faiss.Kmeans(
        features.shape[1],
        num_experts,
        niter=10,
        seed=seed + 1,  # faiss reads 0 as "no seed"
        min_points_per_centroid=1,
        max_points_per_centroid=len(features),
    )
    kmeans.train(features)
    return torch.from_numpy(kmeans.centroids)


def _centroids(features_FX: Tensor, expert_F: Tensor, num_experts: int) -> Tensor:
    sums_EX = torch.zeros(num_experts, features_FX.shape[1]).index_add(0, expert_F, features_FX)
    return sums_EX / (len(features_FX) // num_experts)


def _balanced_assignment(features_FX: Tensor, centroids_EX: Tensor, size: int) -> Tensor:
    """expert_F with exactly `size` neurons an expert, by deferred acceptance.

    Every free neuron asks its nearest expert that has not yet refused it; an expert keeps the
    `size` nearest that asked and refuses the rest (Gale and Shapley, 1962). Ties go to the lower
    neuron, so the result is deterministic.
    """
    distance_FE = torch.cdist(features_FX, centroids_EX)
    preference_FE = distance_FE.argsort(dim=1, stable=True)
    neurons = len(features_FX)
    asked_F = torch.zeros(neurons, dtype=torch.long)
    expert_F = torch.full((neurons,), -1)
    while (free := (expert_F < 0).nonzero().squeeze(1)).numel():
        expert_F[free] = preference_FE[free, asked_F[free]]
        asked_F[free] += 1
        expert_F[_refused(expert_F, distance_FE, size)] = -1
    return expert_F


def _refused(expert_F: Tensor, distance_FE: Tensor, size: int) -> Tensor:
    """The neurons that are not among the `size` nearest of the expert they hold or ask."""
    own_F = distance_FE.gather(1, expert_F[:, None]).squeeze(1)
    by_distance = own_F.argsort(stable=True)
    order = by_distance[expert_F[by_distance].argsort(stable=True)]
    sorted_expert = expert_F[order]
    first = torch.searchsorted(sorted_expert, sorted_expert)
    rank = torch.arange(len(order)) - first
    return order[rank >= size]
