"""A division of neurons into experts, against slow loops over neurons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.kernels.reference import neuron_mask

property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)
leadings = st.lists(st.integers(0, 3), max_size=2)


@st.composite
def divisions(draw: st.DrawFn) -> Division:
    neurons = draw(st.integers(1, 40))
    return Division(neurons, draw(st.integers(1, neurons)))


def whole_numbers(*shape: int) -> Tensor:
    """Sums of them are exact in any order."""
    return torch.randint(-99, 100, shape).double()


def owners(division: Division) -> list[int]:
    """The expert of each neuron."""
    size, longer = divmod(division.neurons, division.num_experts)
    sizes = [size + 1] * longer + [size] * (division.num_experts - longer)
    return [expert for expert, size in enumerate(sizes) for _ in range(size)]


@given(divisions())
@property_test
def test_sizes_differ_by_at_most_one_and_the_longer_come_first(division: Division) -> None:
    sizes = division.sizes
    assert len(sizes) == division.num_experts
    assert sum(sizes) == division.neurons
    assert sizes[0] - sizes[-1] <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(divisions(), leadings)
@property_test
def test_a_sum_is_that_of_each_experts_neurons(division: Division, leading: list[int]) -> None:
    values_TF = whole_numbers(*leading, division.neurons)
    expected_TE = torch.zeros(*leading, division.num_experts).double()
    for neuron, expert in enumerate(owners(division)):
        expected_TE[..., expert] += values_TF[..., neuron]
    assert torch.equal(division.sum_TE(values_TF), expected_TE)


@given(divisions(), leadings)
@property_test
def test_a_spread_gives_each_neuron_its_experts_value(
    division: Division, leading: list[int]
) -> None:
    values_TE = whole_numbers(*leading, division.num_experts)
    expected_TF = torch.stack([values_TE[..., expert] for expert in owners(division)], -1)
    assert torch.equal(division.spread_TF(values_TE), expected_TF)
    mask_TF = division.spread_TF(values_TE > 0)
    assert mask_TF.dtype == torch.bool
    assert torch.equal(mask_TF, expected_TF > 0)
    assert torch.equal(neuron_mask(values_TE, division.neurons), expected_TF)


@given(divisions(), leadings)
@property_test
def test_a_mask_counts_its_experts_neurons(division: Division, leading: list[int]) -> None:
    mask_TE = torch.rand(*leading, division.num_experts) < 0.5
    assert division.count(mask_TE) == int(division.spread_TF(mask_TE).sum())


@pytest.mark.parametrize("neurons", [1, 7])
def test_experts_of_one_neuron_are_spread_without_a_copy(neurons: int) -> None:
    division = Division(neurons, neurons)
    mask_TE = torch.rand(2, 3, neurons) < 0.5
    mask_TF = division.spread_TF(mask_TE)
    assert torch.equal(mask_TF, mask_TE)
    assert mask_TF.data_ptr() == mask_TE.data_ptr()


@given(divisions())
@property_test
def test_experts_are_neurons_when_there_are_as_many(division: Division) -> None:
    assert division.of_neurons == (set(division.sizes) == {1})


@given(divisions())
@property_test
def test_spread_is_the_adjoint_of_sum(division: Division) -> None:
    neurons_TF = whole_numbers(3, division.neurons).requires_grad_()
    experts_TE = whole_numbers(3, division.num_experts).requires_grad_()
    (division.sum_TE(neurons_TF) * experts_TE.detach()).sum().backward()
    assert torch.equal(neurons_TF.grad, division.spread_TF(experts_TE.detach()))
    (division.spread_TF(experts_TE) * neurons_TF.detach()).sum().backward()
    assert torch.equal(experts_TE.grad, division.sum_TE(neurons_TF.detach()))


@given(divisions(), leadings)
@property_test
def test_pieces_are_views_of_all_the_neurons(division: Division, leading: list[int]) -> None:
    values_TF = whole_numbers(*leading, division.neurons)
    pieces = list(division.pieces(values_TF))
    assert len(pieces) == len(set(division.sizes))
    sizes = [piece.shape[-1] for piece in pieces for _ in range(piece.shape[-2])]
    assert sizes == list(division.sizes)
    for piece_TEN in pieces:
        piece_TEN += 1000  # seen through the view
    assert torch.equal(torch.cat([piece.flatten(-2) for piece in pieces], -1), values_TF)
    assert (values_TF > 500).all()


@given(divisions())
@property_test
def test_reduce_sees_every_expert_alone(division: Division) -> None:
    values_TF = whole_numbers(2, division.neurons)
    parts = values_TF.split(division.sizes, -1)
    expected_TE = torch.stack([part_TN.amax(-1) for part_TN in parts], -1)
    assert torch.equal(division.reduce(values_TF, lambda piece: piece.amax(-1)), expected_TE)


@given(
    st.integers(1, 400).flatmap(
        lambda neurons: st.tuples(st.just(neurons), st.integers(1, neurons))
    )
)
@property_test
def test_of_size_has_the_nearest_number_of_experts(case: tuple[int, int]) -> None:
    neurons, size = case
    division = Division.of_size(neurons, size)
    assert division.neurons == neurons
    assert abs(division.num_experts - neurons / size) <= 0.5
    if neurons % size == 0:
        assert division.sizes == (size,) * (neurons // size)


@pytest.mark.parametrize(
    ("neurons", "size", "sizes"),
    [
        (48, 7, (7, 7, 7, 7, 7, 7, 6)),
        (48, 10, (10, 10, 10, 9, 9)),
        (48, 32, (24, 24)),
        (48, 48, (48,)),
        (13, 5, (5, 4, 4)),
        (1, 1, (1,)),
    ],
)
def test_sizes_by_hand(neurons: int, size: int, sizes: tuple[int, ...]) -> None:
    assert Division.of_size(neurons, size).sizes == sizes


@pytest.mark.parametrize("experts", [-1, 0, 49])
def test_every_expert_has_a_neuron(experts: int) -> None:
    with pytest.raises(ValueError, match=f"^48 neurons cannot make {experts} experts$"):
        Division(48, experts)


@pytest.mark.parametrize("size", [-8, 0, 49])
def test_a_size_that_is_not_possible_names_the_ffn(size: int) -> None:
    message = f"^layer has 48 neurons: experts of {size} are not possible$"
    with pytest.raises(ValueError, match=message):
        Division.of_size(48, size, "layer")


def test_the_first_pass_can_be_compiled() -> None:
    mask_TE = torch.rand(3, 4) < 0.5
    fresh = torch.compile(Division(10, 4).spread_TF, backend="eager", fullgraph=True)
    assert torch.equal(fresh(mask_TE), Division(10, 4).spread_TF(mask_TE))
