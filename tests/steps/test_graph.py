"""Partitions of a co-activation graph: exact sizes, and more ties inside experts than by chance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.steps.graph import NEIGHBOURS, coactivation_partition
from moe_tools.steps.partition import Partition, random_partition

property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Symmetric weights of few values, at any scale: many edges are missing, many alike; and E."""
    neurons = draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 99)))
    choices = torch.tensor(
        draw(st.sampled_from([(0.0,), (1.0,), (0.0, 0.0, 1.0, 1e-9), (0.0, 9.0)]))
    )
    half_FF = choices[torch.randint(len(choices), (neurons, neurons))].triu()
    scale = draw(st.sampled_from([1e-30, 1.0, 1e30]))
    return scale * (half_FF + half_FF.T), draw(st.integers(1, neurons))


def slices(partition: Partition) -> tuple[Tensor, ...]:
    """The old neurons of each expert."""
    return partition.order_F.split(partition.division.sizes)


def within(weight_FF: Tensor, partition: Partition) -> float:
    """Weight between different neurons of one expert."""
    groups = (weight_FF[rows][:, rows] for rows in slices(partition))
    return sum(float(group.sum() - group.trace()) for group in groups)


def noise(neurons: int) -> Tensor:
    half_FF = torch.rand(neurons, neurons)
    return half_FF + half_FF.T


@given(graphs(), st.integers(0, 3))
@property_test
def test_every_neuron_has_one_place(case: tuple[Tensor, int], seed: int) -> None:
    weight_FF, experts = case
    neurons = len(weight_FF)
    before_FF = weight_FF.clone()
    partition = coactivation_partition(weight_FF, experts, seed)
    assert partition.division == Division(neurons, experts)
    assert torch.equal(partition.order_F.sort().values, torch.arange(neurons))
    assert torch.equal(weight_FF, before_FF)
    again = coactivation_partition(weight_FF.clone(), experts, seed)
    assert torch.equal(again.order_F, partition.order_F)
    for rows in slices(partition):
        assert torch.equal(rows.sort().values, rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "size"), [(2, 8), (4, 5), (6, 8), (3, 40), (12, 3)])
def test_planted_communities_are_found(experts: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    label_F = torch.arange(experts).repeat(size)[torch.randperm(experts * size)]
    weight_FF = 0.02 * noise(len(label_F)) + (label_F[:, None] == label_F).float()
    for rows in slices(coactivation_partition(weight_FF, experts, seed)):
        assert len(label_F[rows].unique()) == 1


def test_a_neuron_without_a_tie_is_no_error() -> None:
    """What never fires has no edge; what fires with one other only stays with it."""
    weight_FF = torch.zeros(6, 6)
    for one, other in ((0, 5), (1, 4)):
        weight_FF[one, other] = weight_FF[other, one] = 1.0
    groups = [set(rows.tolist()) for rows in slices(coactivation_partition(weight_FF, 2, 0))]
    for pair in ({0, 5}, {1, 4}):
        assert any(pair <= group for group in groups)


@pytest.mark.parametrize("experts", [4, 7, 12])
def test_more_weight_is_inside_experts_than_by_chance(experts: int) -> None:
    """Also where most edges are dropped."""
    neurons = 3 * NEIGHBOURS
    points_F2 = torch.rand(neurons, 2)
    weight_FF = (-8 * torch.cdist(points_F2, points_F2)).exp()
    chance = within(weight_FF, random_partition(neurons, experts, 0))
    assert within(weight_FF, coactivation_partition(weight_FF, experts, 0)) > 1.7 * chance


def test_what_a_neuron_does_alone_has_no_say() -> None:
    weight_FF = noise(30)
    order_F = coactivation_partition(weight_FF, 4, 0).order_F
    weight_FF.fill_diagonal_(1e6)
    assert torch.equal(coactivation_partition(weight_FF, 4, 0).order_F, order_F)


@pytest.mark.parametrize("exponent", [-100, -30, 60, 120])
def test_the_scale_has_no_say(exponent: int) -> None:
    weight_FF = noise(30)
    order_F = coactivation_partition(weight_FF, 4, 0).order_F
    assert torch.equal(coactivation_partition(weight_FF * 2.0**exponent, 4, 0).order_F, order_F)


def test_the_seed_is_that_of_metis() -> None:
    weight_FF = noise(60)
    orders = [coactivation_partition(weight_FF, 6, seed).order_F for seed in range(4)]
    assert any(not torch.equal(orders[0], order_F) for order_F in orders[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_graph_that_is_not_finite_is_refused(value: float) -> None:
    weight_FF = noise(12)
    weight_FF[3, 4] = value
    with pytest.raises(ValueError, match="the co-activation graph is not finite"):
        coactivation_partition(weight_FF, 3, 0)


@pytest.mark.parametrize("experts", [-1, 0, 13])
def test_a_number_of_experts_that_is_not_possible_is_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=f"^12 neurons cannot make {experts} experts$"):
        coactivation_partition(torch.ones(12, 12), experts, 0)
