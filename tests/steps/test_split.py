"""Split reorders neurons: the output stays, and the order is the same on every run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.model.ffn import find_ffns
from moe_tools.recipe import Split
from moe_tools.steps.split import split
from tests.families import EXPERT_SIZE, EXPERTS, FAMILIES, NEURONS, build, logits

METHODS = {
    "by activations": Split(EXPERT_SIZE),
    "by weights": Split(EXPERT_SIZE, by="weights"),
    "random": Split(EXPERT_SIZE, method="random"),
    "contiguous": Split(EXPERT_SIZE, method="contiguous"),
}
every_method = pytest.mark.parametrize("step", METHODS.values(), ids=METHODS)


def text(rows: int = 8, length: int = 16) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def orders(model: PreTrainedModel, step: Split, seed: int) -> list[Tensor]:
    partitions = split(copy.deepcopy(model), step, text(), seed)
    assert {partition.num_experts for partition in partitions} == {EXPERTS}
    return [partition.order_F for partition in partitions]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_method
def test_the_output_stays(step: Split) -> None:
    model = build("llama")
    before = logits(model)
    partitions = split(model, step, text(), seed=0)
    assert len(partitions) == 2
    assert (logits(model) - before).abs().max() <= 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_stays_in_every_family(family: str) -> None:
    model = build(family)
    before = logits(model)
    split(model, METHODS["by activations"], text(32), seed=0)
    assert (logits(model) - before).abs().max() <= 2e-6 * max(1.0, float(before.abs().max()))


@every_method
def test_the_neurons_moved_as_the_partition_says(step: Split) -> None:
    model = build("llama")
    donor = copy.deepcopy(model)
    partitions = split(model, step, text(), seed=0)
    for ffn, was, partition in zip(find_ffns(model), find_ffns(donor), partitions, strict=True):
        for moved, tensor in zip(ffn.weights().per_neuron(), was.weights().per_neuron()):  # noqa: B905
            assert torch.equal(moved, tensor[partition.order_F])


@every_method
def test_the_order_is_the_same_on_every_run(step: Split) -> None:
    model = build("llama")
    assert same(orders(model, step, seed=0), orders(model, step, seed=0))


def test_another_seed_gives_another_random_order() -> None:
    model = build("llama")
    step = METHODS["random"]
    assert not same(orders(model, step, seed=0), orders(model, step, seed=1))


def test_contiguous_is_the_host_s_own_order() -> None:
    model = build("llama")
    for order_F in orders(model, METHODS["contiguous"], seed=0):
        assert torch.equal(order_F, torch.arange(NEURONS))


def test_neurons_that_fire_together_share_an_expert() -> None:
    """Every expert of the donor is one neuron and its copies, in a random order."""
    model = build("llama")
    labels = {}
    for index, ffn in enumerate(find_ffns(model)):
        shuffle = torch.randperm(NEURONS)
        with torch.no_grad():
            for tensor in ffn.weights().per_neuron():
                tensor.copy_(tensor[:NEURONS:EXPERT_SIZE].repeat_interleave(EXPERT_SIZE, 0))
                tensor.copy_(tensor[shuffle])
        labels[index] = (torch.arange(NEURONS) // EXPERT_SIZE)[shuffle]
    for by in ("by activations", "by weights"):
        for index, order_F in enumerate(orders(model, METHODS[by], seed=0)):
            experts_EN = labels[index][order_F].view(EXPERTS, EXPERT_SIZE)
            assert (experts_EN == experts_EN[:, :1]).all()


@every_method
def test_a_size_that_does_not_divide_leaves_the_model_as_it_was(step: Split) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    wrong = Split(10, step.method, step.by)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has 48 neurons, which experts of 10 do"):
        split(model, wrong, text(), seed=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_host_expert_without_a_token_leaves_the_model_as_it_was() -> None:
    """One token reaches 2 of Mixtral's 4 experts."""
    model = build("mixtral")
    find_ffns(model)  # takes the experts apart
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="saw no calibration token"):
        split(model, METHODS["by activations"], text(rows=1, length=1), seed=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_calibration_leaves_nothing_behind() -> None:
    model = build("llama")
    split(model, METHODS["by activations"], text(), seed=0)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert all(parameter.grad is None for parameter in model.parameters())
