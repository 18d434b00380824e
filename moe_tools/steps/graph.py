"""Balanced partition of a co-activation graph.

Letters: F neurons, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.extras import needed
from moe_tools.steps.balance import balanced_assignment
from moe_tools.steps.partition import Partition, contiguous_partition

NEIGHBOURS = 64
"""Strongest edges that are kept of every neuron: a dense graph would only be slower."""
HEAVIEST = 10_000
"""The largest edge, as METIS wants whole numbers."""


def coactivation_partition(weight_FF: Tensor, num_experts: int, seed: int) -> Partition:
    """Experts of neurons that fire together (MoEfication, arXiv 2110.01786).

    METIS cuts the graph into parts of nearly one size; the neurons then go to the part that they
    are most tied to, as far as the exact sizes allow.

    Args:
        weight_FF: how much two neurons fire together: symmetric, 0 or more, at any scale.
        num_experts: E.
        seed: of METIS.

    Raises:
        ValueError: more experts than neurons, or a weight that is not finite.
    """
    neurons = len(weight_FF)
    division = Division(neurons, num_experts)
    weight_FF = weight_FF.detach().double().cpu().clone().fill_diagonal_(0)
    if not torch.isfinite(weight_FF).all():
        raise ValueError("the co-activation graph is not finite: does the donor overflow?")
    if num_experts in (1, neurons) or not weight_FF.any():  # METIS crashes without an edge
        return contiguous_partition(neurons, num_experts)
    part_F = _cut(_strongest(weight_FF), num_experts, seed)
    tied_FE = torch.zeros(neurons, num_experts, dtype=torch.double)
    tied_FE.index_add_(1, part_F, weight_FF)
    return Partition.of_experts(balanced_assignment(-tied_FE, division.sizes), num_experts)


def _strongest(weight_FF: Tensor) -> Tensor:
    """Symmetric whole numbers: an edge stays if it is among the strongest of either end."""
    kept = min(NEIGHBOURS, len(weight_FF) - 1)
    cut_F1 = weight_FF.topk(kept, dim=1).values[:, -1:]
    strong_FF = weight_FF >= cut_F1
    scale = HEAVIEST / weight_FF.max().clamp_min(torch.finfo(torch.double).tiny)
    return ((weight_FF * (strong_FF | strong_FF.T)) * scale).round().long()


def _cut(edges_FF: Tensor, parts: int, seed: int) -> Tensor:
    """part_F by METIS."""
    pymetis = needed("pymetis", "cluster", "a split by coactivation")
    rows, columns = edges_FF.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(edges_FF) + 1))
    _, part = pymetis.part_graph(
        parts,
        pymetis.CSRAdjacency(starts.tolist(), columns.tolist()),
        eweights=edges_FF[rows, columns].tolist(),
        options=pymetis.Options(seed=seed),
    )
    return torch.from_numpy(np.array(part))
