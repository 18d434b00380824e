"""The cheapest assignment of neurons to experts of fixed sizes.

This is the transportation problem. An assignment is optimal when no cycle of experts can pass
neurons on and save something (Klein, 1967); the best set of disjoint cycles is a linear assignment
of E experts to E experts, which stays small however many neurons there are.

Letters: F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_tools.extras import needed

ROUNDING = 1e-12
"""Savings below this share of the cost are rounding."""


def balanced_assignment(
    cost_FE: Tensor, sizes: Sequence[int], start_F: Tensor | None = None
) -> Tensor:
    """expert_F of least total cost with exactly `sizes[e]` neurons in expert e.

    Exact up to rounding, and deterministic.

    Args:
        cost_FE: cost of each neuron in each expert; finite.
        sizes: neurons of each expert; they add up to F, and none is empty.
        start_F: an assignment of these sizes to improve; default: `stable_assignment`.

    Raises:
        ValueError: sizes that do not fit the costs.
    """
    if len(sizes) != cost_FE.shape[1] or sum(sizes) != len(cost_FE) or min(sizes) < 1:
        raise ValueError(f"{len(cost_FE)} neurons do not fill {len(sizes)} experts of those sizes")
    start_F = stable_assignment(cost_FE, sizes) if start_F is None else start_F
    cost = cost_FE.double().numpy()
    expert = start_F.numpy().copy()
    slices = np.cumsum([0, *sizes])
    while (moves := _best_cycles(cost, expert, slices)) is not None:
        neurons, targets = moves
        expert[neurons] = targets
    return torch.from_numpy(expert)


def _best_cycles(
    cost: np.ndarray, expert: np.ndarray, slices: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Neurons to move and where to, one out of and one into each expert; None: optimal."""
    optimize = needed("scipy.optimize", "cluster", "clustering neurons")
    members = np.argsort(expert, kind="stable")
    own = np.take_along_axis(cost, expert[:, None], axis=1)
    saving = (own - cost)[members]
    best = np.maximum.reduceat(saving, slices[:-1], axis=0)  # of expert's neurons, to each expert
    np.fill_diagonal(best, 0.0)
    experts, targets = optimize.linear_sum_assignment(best, maximize=True)
    moved = experts != targets
    if best[experts, targets].sum() <= ROUNDING * np.abs(own).sum():
        return None
    neurons = [
        members[slices[e] + saving[slices[e] : slices[e + 1], target].argmax()]
        for e, target in zip(experts[moved], targets[moved], strict=True)
    ]
    return np.array(neurons), targets[moved]


def stable_assignment(cost_FE: Tensor, sizes: Sequence[int]) -> Tensor:
    """expert_F by deferred acceptance (Gale and Shapley, 1962): a good start, in a few rounds.

    Every free neuron asks its cheapest expert that has not yet refused it; an expert keeps the
    cheapest that asked, as many as it has places, and refuses the rest. Ties go to the lower
    neuron.
    """
    preference_FE = cost_FE.argsort(dim=1, stable=True)
    places_E = torch.tensor(sizes)
    asked_F = torch.zeros(len(cost_FE), dtype=torch.long)
    expert_F = torch.full((len(cost_FE),), -1)
    while (free := (expert_F < 0).nonzero().squeeze(1)).numel():
        expert_F[free] = preference_FE[free, asked_F[free]]
        asked_F[free] += 1
        expert_F[_refused(expert_F, cost_FE, places_E)] = -1
    return expert_F


def _refused(expert_F: Tensor, cost_FE: Tensor, places_E: Tensor) -> Tensor:
    """The neurons that are not among the cheapest of the expert they hold or ask."""
    own_F = cost_FE.gather(1, expert_F[:, None]).squeeze(1)
    by_cost = own_F.argsort(stable=True)
    order = by_cost[expert_F[by_cost].argsort(stable=True)]
    expert = expert_F[order]
    rank = torch.arange(len(order)) - torch.searchsorted(expert, expert)
    return order[rank >= places_E[expert]]
