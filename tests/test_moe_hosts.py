"""MoE hosts whose experts are split, swapped and routed in their turn: two levels of sparsity."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.measure.evaluate import evaluate
from moe_tools.model.checkpoint import load, save
from moe_tools.model.conversion import Conversion, read_conversion
from moe_tools.model.experts import every_expert_on, expert_ffns
from moe_tools.model.routing import record_routing
from moe_tools.recipe import Attach, Budget, Split, Swap
from moe_tools.steps.attach import attach
from moe_tools.steps.budget import budget
from moe_tools.steps.split import split
from moe_tools.steps.swap import swap
from tests.families import (
    EXPERT_SIZE,
    MOE,
    NEURONS,
    aligned,
    build,
    is_router,
    logits,
    routed,
    stored_shapes,
)

VISITED = {"mixtral": 2 * 2, "olmoe": 2 * 2, "qwen2_moe": 1 + (2 + 1), "qwen3_moe": 1 + 2}
"""FFNs that a token passes: two of four experts in a layer, one of Qwen2 shared beside them; the
first layer of both Qwens is dense."""
FFNS = {"mixtral": 2 * 4, "olmoe": 2 * 4, "qwen2_moe": 1 + (4 + 1), "qwen3_moe": 1 + 4}
NEURON = 3 * 2 * 16
"""FLOPs of one neuron: gate, up and down."""
every_moe = pytest.mark.parametrize("family", MOE)


def text() -> Tensor:
    return torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(2))


def converted(donor: PreTrainedModel) -> PreTrainedModel:
    """dReLU in every expert, then a router on what each expert was split into."""
    model = copy.deepcopy(donor)
    swap(model, Swap({"kind": "drelu"}), Conversion("donor"), text())
    split(model, Split(EXPERT_SIZE, shared_experts=1), text(), seed=0)
    made = read_conversion(model)
    assert made is not None
    so_far = replace(made, expert_size=EXPERT_SIZE, shared_experts=1)
    selector = {"kind": "topk", "share": 0.5}
    attach(model, Attach("oracle", selector=selector), so_far, text())
    budget(model, Budget(0.5), text())
    return model


@every_moe
def test_experts_of_a_host_from_swap_to_a_loaded_folder(family: str, tmp_path: Path) -> None:
    donor = build(family)
    model = converted(donor)
    swapped = copy.deepcopy(donor)
    swap(swapped, Swap({"kind": "drelu"}), Conversion("donor"), text())
    dense = logits(swapped)
    with every_expert_on(model):
        assert (logits(model) - dense).abs().max() <= 2e-6 * max(1.0, float(dense.abs().max()))
    assert (logits(model) - dense).abs().max() > 1e-3

    save(model, tmp_path / "out")
    donor.save_pretrained(tmp_path / "donor", save_original_format=False)
    stored = stored_shapes(tmp_path / "out")
    host = {key: shape for key, shape in stored.items() if not is_router(key)}
    assert host == stored_shapes(tmp_path / "donor")
    loaded = aligned(load(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(aligned(model)))
    assert read_conversion(loaded) == read_conversion(model)
    one, other = evaluate(loaded, text()), evaluate(aligned(model), text())
    assert replace(one, seconds=0) == replace(other, seconds=0)


@every_moe
def test_both_levels_are_counted(family: str) -> None:
    model = converted(build(family))
    with record_routing(model) as routings:
        seen = evaluate(model, text(), batch_size=3)
    tokens, on = text().numel(), sum(routing.neurons_on for routing in routings)
    passed = VISITED[family] * tokens
    assert sum(routing.tokens for routing in routings) == passed
    assert len(expert_ffns(model)) == FFNS[family]
    assert seen.ffn_sparsity == pytest.approx(1 - on / (passed * NEURONS), abs=1e-12)
    assert seen.ffn_sparsity == pytest.approx(0.5, abs=0.1)
    everything = FFNS[family] * tokens * NEURONS
    assert seen.two_level_sparsity == pytest.approx(1 - on / everything, abs=1e-12)

    assert seen.flops.ffn_dense == VISITED[family] * NEURON * NEURONS
    assert seen.flops.ffn == pytest.approx(on * NEURON / tokens)
    oracle = expert_ffns(model)[0].router.flops()
    assert seen.flops.router == VISITED[family] * oracle


@every_moe
def test_a_host_as_it_is_has_the_sparsity_of_its_own_router(family: str) -> None:
    seen = evaluate(build(family), text())
    assert seen.ffn_sparsity == 0
    assert seen.two_level_sparsity == pytest.approx(1 - VISITED[family] / FFNS[family])


def test_a_host_without_experts_has_one_level() -> None:
    assert evaluate(build("llama"), text()).two_level_sparsity is None
    model, _ = routed(build("llama"))
    assert evaluate(model, text()).two_level_sparsity is None


def test_a_host_that_chooses_every_expert_has_one_level() -> None:
    assert evaluate(build("olmoe", num_experts_per_tok=4), text()).two_level_sparsity is None


def test_counting_leaves_nothing_behind() -> None:
    model = build("mixtral")
    evaluate(model, text())
    assert not any(module._forward_pre_hooks for module in model.modules())
