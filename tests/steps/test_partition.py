"""Partitions: permutations with experts of almost one size, whatever the features are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.steps.partition import (
    Partition,
    contiguous_partition,
    kmeans_partition,
    random_partition,
)

PARTITIONS = {
    "contiguous": lambda features, experts, seed: contiguous_partition(len(features), experts),
    "random": lambda features, experts, seed: random_partition(len(features), experts, seed),
    "kmeans": kmeans_partition,
}
every_partition = pytest.mark.parametrize("method", PARTITIONS)
property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@st.composite
def neuron_features(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(F, X) features of few distinct values, so that many rows repeat or are zero; and E."""
    neurons, width = draw(st.integers(1, 36)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, min(neurons, 7)))
    values = st.sampled_from([0.0, 0.0, 1.0, -1.0, 1e-30, 1e30])
    rows = draw(st.lists(values, min_size=neurons * width, max_size=neurons * width))
    return torch.tensor(rows).view(neurons, width), experts


def slices(partition: Partition) -> tuple[Tensor, ...]:
    """The old neurons of each expert."""
    return partition.order_F.split(partition.division.sizes)


def spread(features_FX: Tensor, partition: Partition) -> float:
    """Sum over the neurons of the squared distance to the mean of their expert."""
    groups = [features_FX[rows_N] for rows_N in slices(partition)]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


def strangers(label_F: Tensor, partition: Partition) -> int:
    """Neurons whose label is not the most frequent one of their expert."""
    return sum(len(rows) - int(label_F[rows].bincount().max()) for rows in slices(partition))


@every_partition
@given(case=neuron_features(), seed=st.integers(0, 3))
@property_test
def test_every_neuron_has_one_place(method: str, case: tuple[Tensor, int], seed: int) -> None:
    features_FX, experts = case
    partition = PARTITIONS[method](features_FX, experts, seed)
    assert partition.division == Division(len(features_FX), experts)
    assert torch.equal(partition.order_F.sort().values, torch.arange(len(features_FX)))
    again = PARTITIONS[method](features_FX.clone(), experts, seed)
    assert torch.equal(again.order_F, partition.order_F)


@given(case=neuron_features(), seed=st.integers(0, 3))
@property_test
def test_an_expert_keeps_the_host_order_inside(case: tuple[Tensor, int], seed: int) -> None:
    for rows_N in slices(kmeans_partition(*case, seed)):
        assert torch.equal(rows_N.sort().values, rows_N)


def test_a_partition_of_experts_takes_them_in_turn() -> None:
    partition = Partition.of_experts(torch.tensor([2, 0, 1, 0, 1, 0, 2]), 3)
    assert partition.order_F.tolist() == [1, 3, 5, 2, 4, 0, 6]
    assert [rows_N.tolist() for rows_N in slices(partition)] == [[1, 3, 5], [2, 4], [0, 6]]


def test_contiguous_is_the_host_order() -> None:
    assert contiguous_partition(6, 3).order_F.tolist() == [0, 1, 2, 3, 4, 5]


def test_random_depends_on_the_seed() -> None:
    first, second = (random_partition(64, 8, seed).order_F for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("experts", "size"), [(2, 8), (4, 5), (6, 8), (12, 3)])
def test_kmeans_finds_planted_clusters(experts: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    label_F = torch.arange(experts).repeat(size)[torch.randperm(experts * size)]
    centres_EX = 10 * torch.eye(experts)
    features_FX = centres_EX[label_F] + 0.1 * torch.randn(len(label_F), experts)
    partition = kmeans_partition(features_FX, experts, seed)
    assert strangers(label_F, partition) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("experts", "neurons"), [(2, 17), (4, 21), (6, 45), (6, 47)])
def test_kmeans_finds_planted_clusters_of_two_sizes(experts: int, neurons: int, seed: int) -> None:
    """Which clusters get the longer experts is left to chance; the others lend them a neuron."""
    torch.manual_seed(seed)
    division = Division(neurons, experts)
    label_F = division.spread_TF(torch.arange(experts))[torch.randperm(neurons)]
    features_FX = 10 * torch.eye(experts)[label_F] + 0.1 * torch.randn(neurons, experts)
    partition = kmeans_partition(features_FX, experts, seed)
    longer = neurons % experts
    assert strangers(label_F, partition) <= min(longer, experts - longer)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("experts", [12, 13])
def test_kmeans_groups_closer_neurons_than_chance(experts: int, seed: int) -> None:
    features_FX = torch.randn(96, 5)
    chance = spread(features_FX, random_partition(96, experts, seed))
    assert spread(features_FX, kmeans_partition(features_FX, experts, seed)) < 0.6 * chance


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("neurons", "experts"), [(24, 4), (26, 4), (40, 7)])
def test_kmeans_ends_where_no_exchange_of_neurons_helps(
    neurons: int, experts: int, seed: int
) -> None:
    torch.manual_seed(seed)
    features_FX = torch.randn(neurons, 5) + 3
    partition = kmeans_partition(features_FX, experts, seed)
    means_EX = torch.stack([features_FX[rows_N].mean(0) for rows_N in slices(partition)])
    owner_F = partition.division.spread_TF(torch.arange(experts))
    cost = torch.cdist(features_FX[partition.order_F], means_EX).square().double().numpy()
    places = cost[:, owner_F]  # a column for each place of an expert
    assert spread(features_FX, partition) == pytest.approx(places.trace(), rel=1e-5)
    least = places[linear_sum_assignment(places)].sum()
    assert places.trace() == pytest.approx(least, rel=1e-5)


def test_kmeans_puts_copies_of_a_neuron_together() -> None:
    features_FX = torch.eye(5).repeat(4, 1)
    assert strangers(torch.arange(20) % 5, kmeans_partition(features_FX, 5, 0)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_kmeans_takes_any_float_and_leaves_it_alone(dtype: torch.dtype) -> None:
    features_FX = torch.randn(12, 3).to(dtype).requires_grad_()
    before = features_FX.detach().clone()
    assert kmeans_partition(features_FX, 3, 0).order_F.sort().values.tolist() == list(range(12))
    assert torch.equal(features_FX, before)
    assert features_FX.grad is None


@pytest.mark.parametrize("exponent", [-100, -30, 70, 125])
def test_kmeans_does_not_mind_the_scale(exponent: int) -> None:
    features_FX = torch.rand(24, 3)
    order_F = kmeans_partition(features_FX, 6, 0).order_F
    assert torch.equal(kmeans_partition(features_FX * 2.0**exponent, 6, 0).order_F, order_F)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_kmeans_refuses_what_is_not_finite(value: float) -> None:
    features_FX = torch.randn(12, 3)
    features_FX[7, 1] = value
    with pytest.raises(ValueError, match="features that are not finite"):
        kmeans_partition(features_FX, 3, 0)


def test_kmeans_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    kmeans_partition(torch.ones(12, 3), 3, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("experts", [-1, 0, 13])
def test_a_number_of_experts_that_is_not_possible_is_refused(experts: int) -> None:
    message = f"^12 neurons cannot make {experts} experts$"
    for method in PARTITIONS.values():
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(12, 1), experts, 0)
    with pytest.raises(ValueError, match=message):
        Partition(torch.arange(12), experts)
