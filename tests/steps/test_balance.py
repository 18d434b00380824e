"""Balanced assignments against scipy's, which gets one column for each place of an expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_tools.steps.balance import balanced_assignment, stable_assignment

property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)
few_numbers = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, -1.0, 5.0, -7.0])
wild_numbers = st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30, -1e30])


@st.composite
def problems(
    draw: st.DrawFn, values: st.SearchStrategy[float] = few_numbers
) -> tuple[Tensor, list[int]]:
    """cost_FE of few distinct values, so that many tie, and any sizes that fill it."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    count = sum(sizes) * len(sizes)
    costs = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(costs).view(sum(sizes), len(sizes)), sizes


def total(cost_FE: Tensor, expert_F: Tensor) -> float:
    return float(cost_FE.double().gather(1, expert_F[:, None]).sum())


def filled(sizes: list[int]) -> Tensor:
    """Neurons in order: the first expert's, the second's, ..."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def shuffled(sizes: list[int], seed: int) -> Tensor:
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    return filled(sizes)[order]


def slow_optimum(cost_FE: Tensor, sizes: list[int]) -> float:
    cost = cost_FE.double()[:, filled(sizes)].numpy()
    return float(cost[linear_sum_assignment(cost)].sum())


def counts(expert_F: Tensor, sizes: list[int]) -> list[int]:
    return expert_F.bincount(minlength=len(sizes)).tolist()


@given(problems(), st.sampled_from([-100, 0, 100]))
@property_test
def test_the_cost_is_the_least_there_is(problem: tuple[Tensor, list[int]], exponent: int) -> None:
    """Exactly: sums of whole numbers times a power of two do not round."""
    cost_FE, sizes = problem
    cost_FE = cost_FE * 2.0**exponent
    expert_F = balanced_assignment(cost_FE, sizes)
    assert counts(expert_F, sizes) == sizes
    assert total(cost_FE, expert_F) == slow_optimum(cost_FE, sizes)


@given(problems(), st.integers(0, 9))
@property_test
def test_a_start_is_improved_to_the_least_cost(
    problem: tuple[Tensor, list[int]], seed: int
) -> None:
    cost_FE, sizes = problem
    start_F = shuffled(sizes, seed)
    before = start_F.clone(), cost_FE.clone()
    expert_F = balanced_assignment(cost_FE, sizes, start_F)
    assert torch.equal(start_F, before[0]) and torch.equal(cost_FE, before[1])
    assert counts(expert_F, sizes) == sizes
    assert total(cost_FE, expert_F) == slow_optimum(cost_FE, sizes)
    assert torch.equal(balanced_assignment(cost_FE, sizes, expert_F), expert_F)


@given(problems(wild_numbers), st.integers(0, 9))
@property_test
def test_costs_of_any_size_are_least_up_to_rounding(
    problem: tuple[Tensor, list[int]], seed: int
) -> None:
    cost_FE, sizes = problem
    rounding = 1e-9 * float(cost_FE.abs().max())
    start_F = shuffled(sizes, seed)
    for expert_F in (
        balanced_assignment(cost_FE, sizes),
        balanced_assignment(cost_FE, sizes, start_F),
    ):
        assert counts(expert_F, sizes) == sizes
        assert total(cost_FE, expert_F) <= slow_optimum(cost_FE, sizes) + rounding
        assert total(cost_FE, expert_F) <= total(cost_FE, start_F) + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e3, 1e3])
def test_a_random_problem_of_many_neurons(dtype: torch.dtype, offset: float) -> None:
    sizes = [12, 1, 30, 7, 7, 20, 3, 16, 4, 20]
    cost_FE = (torch.randn(sum(sizes), len(sizes)) + offset).to(dtype)
    expert_F = balanced_assignment(cost_FE, sizes)
    assert counts(expert_F, sizes) == sizes
    assert total(cost_FE, expert_F) == pytest.approx(slow_optimum(cost_FE, sizes), rel=1e-9)
    greedy_F = stable_assignment(cost_FE, sizes)
    assert total(cost_FE, expert_F) < total(cost_FE, greedy_F)


@given(problems())
@property_test
def test_the_assignment_is_the_same_on_every_call(problem: tuple[Tensor, list[int]]) -> None:
    cost_FE, sizes = problem
    for method in (balanced_assignment, stable_assignment):
        assert torch.equal(method(cost_FE, sizes), method(cost_FE.clone(), tuple(sizes)))


@pytest.mark.parametrize("cost", [0.0, 3.0, -1e30])
def test_equal_costs_keep_the_order_or_the_start(cost: float) -> None:
    sizes = [3, 1, 2]
    cost_FE = torch.full((6, 3), cost)
    assert balanced_assignment(cost_FE, sizes).tolist() == [0, 0, 0, 1, 2, 2]
    start_F = torch.tensor([2, 0, 1, 0, 2, 0])
    assert torch.equal(balanced_assignment(cost_FE, sizes, start_F), start_F)


def test_three_experts_pass_neurons_round() -> None:
    """No two neurons can swap and save: only the cycle of three does."""
    cost_FE = torch.tensor([[1.0, 0.0, 9.0], [9.0, 1.0, 0.0], [0.0, 9.0, 1.0]])
    start_F = torch.tensor([0, 1, 2])
    assert balanced_assignment(cost_FE, [1, 1, 1], start_F).tolist() == [1, 2, 0]


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3), (6,), (2, 2, 2), (6, 0), (7, -1), ()], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...]) -> None:
    message = f"^6 neurons do not fill {len(sizes)} experts of those sizes$"
    with pytest.raises(ValueError, match=message):
        balanced_assignment(torch.zeros(6, 2), sizes)


@given(st.one_of(problems(), problems(wild_numbers)))
@property_test
def test_a_stable_assignment_leaves_no_pair_that_prefers_each_other(
    problem: tuple[Tensor, list[int]],
) -> None:
    cost_FE, sizes = problem
    expert_F = stable_assignment(cost_FE, sizes)
    assert counts(expert_F, sizes) == sizes
    for neuron, expert in enumerate(expert_F.tolist()):
        for other in range(len(sizes)):
            wanted = cost_FE[neuron, other] < cost_FE[neuron, expert]
            dearest = cost_FE[expert_F == other, other].max()
            assert not (wanted and cost_FE[neuron, other] < dearest)


def test_a_stable_assignment_gives_ties_to_the_lower_neuron() -> None:
    cost_FE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert stable_assignment(cost_FE, [2, 2]).tolist() == [1, 0, 0, 1]
