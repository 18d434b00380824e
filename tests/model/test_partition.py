"""Partitions: permutations with experts of one size, whatever the features are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.model.partition import (
    Partition,
    check_division,
    contiguous_partition,
    experts_of_size,
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
    experts, size, width = (draw(st.integers(1, top)) for top in (6, 6, 4))
    values = st.sampled_from([0.0, 0.0, 1.0, -1.0, 1e-30, 1e30])
    count = experts * size * width
    rows = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(rows).view(experts * size, width), experts


def slices(partition: Partition) -> Tensor:
    """The old neurons of each expert, a row an expert."""
    return partition.order_F.view(partition.num_experts, -1)


def spread(features_FX: Tensor, partition: Partition) -> float:
    """Sum over the neurons of the squared distance to the mean of their expert."""
    groups = features_FX[slices(partition)]
    return float((groups - groups.mean(1, keepdim=True)).square().sum())


@every_partition
@given(case=neuron_features(), seed=st.integers(0, 3))
@property_test
def test_every_neuron_has_one_place(method: str, case: tuple[Tensor, int], seed: int) -> None:
    features_FX, experts = case
    partition = PARTITIONS[method](features_FX, experts, seed)
    assert partition.num_experts == experts
    assert torch.equal(partition.order_F.sort().values, torch.arange(len(features_FX)))
    again = PARTITIONS[method](features_FX.clone(), experts, seed)
    assert torch.equal(again.order_F, partition.order_F)


@given(case=neuron_features(), seed=st.integers(0, 3))
@property_test
def test_an_expert_keeps_the_host_order_inside(case: tuple[Tensor, int], seed: int) -> None:
    rows = slices(kmeans_partition(*case, seed))
    assert torch.equal(rows.sort(dim=1).values, rows)


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
    found = label_F[slices(kmeans_partition(features_FX, experts, seed))]
    assert (found == found[:, :1]).all()
    assert found[:, 0].sort().values.tolist() == list(range(experts))


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_groups_closer_neurons_than_chance(seed: int) -> None:
    features_FX = torch.randn(96, 5)
    chance = spread(features_FX, random_partition(96, 12, seed))
    assert spread(features_FX, kmeans_partition(features_FX, 12, seed)) < 0.6 * chance


def test_kmeans_puts_copies_of_a_neuron_together() -> None:
    features_FX = torch.eye(5).repeat(4, 1)
    rows = slices(kmeans_partition(features_FX, 5, 0))
    assert (rows % 5 == rows[:, :1] % 5).all()


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


@pytest.mark.parametrize(
    ("neurons", "experts", "nearest"),
    [
        (11008, 100, "86, 128"),
        (48, 7, "6, 8"),
        (48, 100, "48"),
        (48, 0, "1"),
        (48, -3, "1"),
        (13, 5, "1, 13"),
    ],
)
def test_experts_that_do_not_divide_name_the_nearest(
    neurons: int, experts: int, nearest: str
) -> None:
    message = (
        f"^layer has {neurons} neurons, which {experts} experts do not divide; nearest: {nearest}$"
    )
    with pytest.raises(ValueError, match=message):
        check_division(neurons, experts, "layer")
    for method in PARTITIONS.values():
        with pytest.raises(ValueError, match=f"nearest: {nearest}$"):
            method(torch.zeros(neurons, 1), experts, 0)
    with pytest.raises(ValueError, match=f"nearest: {nearest}$"):
        Partition(torch.arange(neurons), experts)


@pytest.mark.parametrize(
    ("neurons", "size", "nearest"),
    [(48, 7, "6, 8"), (48, 100, "24, 48"), (48, 0, "1, 2"), (13, 5, "1, 13")],
)
def test_sizes_that_do_not_divide_name_the_nearest(neurons: int, size: int, nearest: str) -> None:
    message = (
        f"^layer has {neurons} neurons, which experts of {size} do not divide; "
        f"nearest sizes: {nearest}$"
    )
    with pytest.raises(ValueError, match=message):
        experts_of_size(neurons, size, "layer")


@given(neurons=st.integers(1, 400), asked=st.integers(-5, 500))
@property_test
def test_the_named_counts_are_the_nearest_divisors(neurons: int, asked: int) -> None:
    divisors = [count for count in range(1, neurons + 1) if neurons % count == 0]
    if asked in divisors:
        check_division(neurons, asked)
        assert experts_of_size(neurons, asked) == neurons // asked
        return
    below = [count for count in divisors if count < asked][-1:]
    above = [count for count in divisors if count > asked][:1]
    with pytest.raises(ValueError, match=f"nearest: {', '.join(map(str, below + above))}$"):
        check_division(neurons, asked)
