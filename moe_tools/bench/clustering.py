"""Balanced k-means: time, balance, and the objective beside that of exact min-cost flow.

Letters: F neurons, E experts, X feature dimension.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from moe_tools.experts.division import Division
from moe_tools.steps.partition import kmeans_partition

SIZES = {"smollm2-135m": (1536, 576, 48), "llama2-7b": (11008, 4096, 344)}
"""Name -> (F, X, E): the gate rows of an FFN in experts of 32 neurons."""


@dataclass(frozen=True)
class Clustering:
    """One clustering of the rows of one FFN."""

    by: str
    """ours, or min-cost flow: the package k-means-constrained."""
    neurons: int
    width: int
    experts: int
    seconds: float
    objective: float
    """Sum of the squared distances between neurons and the mean of their expert."""
    smallest: int
    """Number of neurons in the smallest expert; below it, in the largest."""
    largest: int


def bench_clustering(shape: str) -> list[Clustering]:
    """Times our clustering, and min-cost flow where it is installed and the size lets it finish.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SIZES:
        raise ValueError(f"unknown shape {shape!r} (known: {', '.join(SIZES)})")
    neurons, width, experts = SIZES[shape]
    rows_FX = planted_rows(neurons, width, experts)
    began = time.perf_counter()
    partition = kmeans_partition(rows_FX, experts, seed=0)
    seconds = time.perf_counter() - began
    expert_F = torch.empty(neurons, dtype=torch.long)
    expert_F[partition.order_F] = partition.division.spread_TF(torch.arange(experts))
    made = [_clustering("ours", rows_FX, expert_F, experts, seconds)]
    if shape == "smollm2-135m":
        made += _min_cost_flow(rows_FX, experts)
    return made


def planted_rows(neurons: int, width: int, experts: int) -> Tensor:
    """Draws unit rows around three times as many centres as experts: no clusters are clear."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(3 * experts, width, generator=random)
    own = torch.randint(3 * experts, (neurons,), generator=random)
    noise = torch.randn(neurons, width, generator=random)
    return nn.functional.normalize(centres[own] + 2 * noise)


def _min_cost_flow(rows_FX: Tensor, experts: int) -> list[Clustering]:
    try:
        package = import_module("k_means_constrained")
    except ModuleNotFoundError:
        return []
    sizes = Division(len(rows_FX), experts).sizes
    began = time.perf_counter()
    found = package.KMeansConstrained(
        experts, size_min=min(sizes), size_max=max(sizes), n_init=1, random_state=0
    ).fit(rows_FX.double().numpy())
    seconds = time.perf_counter() - began
    expert_F = torch.from_numpy(found.labels_).long()
    return [_clustering("min-cost flow", rows_FX, expert_F, experts, seconds)]


def _clustering(
    by: str, rows_FX: Tensor, expert_F: Tensor, experts: int, seconds: float
) -> Clustering:
    sizes_E = expert_F.bincount(minlength=experts)
    sums_EX = torch.zeros(experts, rows_FX.shape[1]).index_add(0, expert_F, rows_FX)
    means_EX = sums_EX / sizes_E[:, None]
    return Clustering(
        by=by,
        neurons=len(rows_FX),
        width=rows_FX.shape[1],
        experts=experts,
        seconds=seconds,
        objective=float((rows_FX - means_EX[expert_F]).double().square().sum()),
        smallest=int(sizes_E.min()),
        largest=int(sizes_E.max()),
    )
