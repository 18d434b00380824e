"""Split reorders neurons: the output stays, and the order is the same on every run."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.recipe import Split
from moe_tools.steps.split import split
from tests.families import (
    EXPERT_SIZE,
    EXPERTS,
    FAMILIES,
    NEURONS,
    SIZES,
    UNEVEN,
    build,
    every_size,
    logits,
)

split_module = importlib.import_module(split.__module__)
METHODS = {
    "by activations": Split(EXPERT_SIZE),
    "by marks": Split(EXPERT_SIZE, by="marks"),
    "by weights": Split(EXPERT_SIZE, by="weights"),
    "coactivation": Split(EXPERT_SIZE, method="coactivation"),
    "random": Split(EXPERT_SIZE, method="random"),
    "contiguous": Split(EXPERT_SIZE, method="contiguous"),
}
every_shared = pytest.mark.parametrize("shared", [0, 1, 2])
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
@every_shared
def test_the_output_stays(step: Split, shared: int) -> None:
    model = build("llama")
    before = logits(model)
    partitions = split(model, replace(step, shared_experts=shared), text(), seed=0)
    assert len(partitions) == 2
    assert (logits(model) - before).abs().max() <= 2e-6


@pytest.mark.parametrize("family", FAMILIES)
@every_size
@pytest.mark.parametrize("method", ["kmeans", "coactivation"])
def test_the_output_stays_in_every_family(family: str, size: int, method: Any) -> None:
    model = build(family)
    before = logits(model)
    split(model, Split(size, method, shared_experts=1), text(32), seed=0)
    assert (logits(model) - before).abs().max() <= 2e-6 * max(1.0, float(before.abs().max()))


@every_method
def test_the_neurons_moved_as_the_partition_says(step: Split) -> None:
    model = build("llama")
    donor = copy.deepcopy(model)
    partitions = split(model, step, text(), seed=0)
    for ffn, was, partition in zip(
        unfused_ffns(model), unfused_ffns(donor), partitions, strict=True
    ):
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
    for index, ffn in enumerate(unfused_ffns(model)):
        shuffle = torch.randperm(NEURONS)
        with torch.no_grad():
            for tensor in ffn.weights().per_neuron():
                tensor.copy_(tensor[:NEURONS:EXPERT_SIZE].repeat_interleave(EXPERT_SIZE, 0))
                tensor.copy_(tensor[shuffle])
        labels[index] = (torch.arange(NEURONS) // EXPERT_SIZE)[shuffle]
    for by in ("by activations", "by weights", "coactivation"):
        for index, order_F in enumerate(orders(model, METHODS[by], seed=0)):
            experts_EN = labels[index][order_F].view(EXPERTS, EXPERT_SIZE)
            assert (experts_EN == experts_EN[:, :1]).all()


@every_method
@every_shared
def test_a_size_that_does_not_divide_makes_experts_of_two_sizes(step: Split, shared: int) -> None:
    model = build("llama")
    before = logits(model)
    uneven = replace(step, expert_size=UNEVEN, shared_experts=shared)
    partitions = split(model, uneven, text(), seed=0)
    assert [partition.division.sizes for partition in partitions] == [SIZES[UNEVEN]] * 2
    assert (logits(model) - before).abs().max() <= 2e-6


@every_method
def test_a_size_beyond_the_neurons_leaves_the_model_as_it_was(step: Split) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    wrong = Split(49, step.method, step.by)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has 48 neurons: experts of 49 are not"):
        split(model, wrong, text(), seed=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_host_expert_without_a_token_leaves_the_model_as_it_was() -> None:
    """One token reaches 2 of Mixtral's 4 experts."""
    model = build("mixtral")
    unfused_ffns(model)  # takes the experts apart
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


# --- shared experts


@torch.no_grad()
def marks(model: PreTrainedModel) -> list[Tensor]:
    """For every FFN, how many tokens have a neuron among their 10 largest |h|; a slow loop."""
    counts = [torch.zeros(NEURONS, dtype=torch.long) for _ in unfused_ffns(model)]
    hooks = []
    for ffn, count_F in zip(unfused_ffns(model), counts, strict=True):

        def count(_: Any, args: tuple[Tensor, ...], count_F: Tensor = count_F) -> None:
            for h_F in args[0].flatten(0, -2).abs():
                for neuron in sorted(range(NEURONS), key=lambda n: -float(h_F[n]))[:10]:
                    count_F[neuron] += 1

        hooks.append(ffn.down.register_forward_pre_hook(count))
    model(input_ids=text())
    for hook in hooks:
        hook.remove()
    return counts


@every_method
@pytest.mark.parametrize(("size", "shared", "neurons"), [(EXPERT_SIZE, 2, 16), (UNEVEN, 1, 10)])
def test_shared_experts_are_the_neurons_that_fire_most_often(
    step: Split, size: int, shared: int, neurons: int
) -> None:
    model = build("llama")
    counts = marks(model)
    step = replace(step, expert_size=size, shared_experts=shared)
    for partition, count_F in zip(split(model, step, text(), seed=0), counts, strict=True):
        first_F, rest_F = partition.order_F[:neurons], partition.order_F[neurons:]
        assert count_F[first_F].min() >= count_F[rest_F].max()
        assert torch.equal(first_F.sort().values, first_F)  # in the host's order
        assert partition.order_F.sort().values.tolist() == list(range(NEURONS))


def test_contiguous_keeps_the_host_s_order_after_shared_experts() -> None:
    step = replace(METHODS["contiguous"], shared_experts=1)
    for order_F in orders(build("llama"), step, seed=0):
        rest_F = order_F[EXPERT_SIZE:]
        assert torch.equal(rest_F.sort().values, rest_F)


@pytest.mark.parametrize("shared", [6, 7])
def test_some_expert_is_left_to_route(shared: int) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    message = rf"layers\.0\.mlp: {shared} of 6 experts cannot be shared$"
    with pytest.raises(ValueError, match=message):
        split(model, Split(EXPERT_SIZE, shared_experts=shared), text(), seed=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_one_routed_expert_is_enough() -> None:
    for order_F in orders(build("llama"), Split(EXPERT_SIZE, shared_experts=5), seed=0):
        assert order_F.sort().values.tolist() == list(range(NEURONS))


# --- memory


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("graphs", [0, 1, 3])
def test_graphs_that_do_not_fit_take_more_passes_and_change_nothing(
    family: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    step = replace(METHODS["coactivation"], shared_experts=1)
    at_once = orders(model, step, seed=0)
    passes = []
    real = split_module.visit_activations

    def visit(*args: Any, **kwargs: Any) -> None:
        passes.append(1)
        real(*args, **kwargs)

    monkeypatch.setattr(split_module, "visit_activations", visit)
    monkeypatch.setattr(split_module, "GRAPH_BYTES", graphs * 4 * NEURONS**2)
    assert same(orders(model, step, seed=0), at_once)
    assert len(passes) == -(-len(at_once) // max(1, graphs))


@pytest.mark.parametrize("name", ["by weights", "random", "contiguous"])
def test_what_needs_no_text_reads_none(name: str) -> None:
    """Two tokens that the model does not have would be an IndexError."""
    split(build("llama"), METHODS[name], torch.tensor([[1000, 1000]]), seed=0)


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "random", "contiguous"])
def test_single_neurons_stay_where_they_are_and_need_no_text(method: str) -> None:
    model, step = build("llama"), Split(expert_size=1, method=method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not step.needs_text()
    found = split(model, step, torch.empty(0, 8, dtype=torch.long), seed=1)
    assert all(torch.equal(one.order_F, torch.arange(NEURONS)) for one in found)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
