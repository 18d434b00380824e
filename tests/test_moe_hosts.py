"""MoE hosts whose experts are split, swapped and routed in their turn: two levels of sparsity."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, read_conversion
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.two_levels import TwoLevels
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


@contextmanager
def numbers_at_work(model: PreTrainedModel) -> Iterator[Counter[str]]:
    """Layer -> how many numbers that are not 0 entered the down projections of its MoE."""
    working: Counter[str] = Counter()

    def count(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            working[layer] += int(args[0].count_nonzero())

        return see

    handles = [
        module.register_forward_pre_hook(count(name.partition(".mlp.")[0]))
        for name, module in model.named_modules()
        if ".mlp.experts." in name or ".mlp.shared_expert." in name
        if name.endswith("down_proj")
    ]
    try:
        yield working
    finally:
        for handle in handles:
            handle.remove()


def by_hand(family: str, working: Counter[str]) -> dict[str, dict[str, float]]:
    """The figures of each MoE layer, from the numbers at work in it."""
    tokens, shared = text().numel(), int(family == "qwen2_moe")
    chosen, everything = (2 + shared) * tokens * NEURONS, (4 + shared) * tokens * NEURONS
    return {
        f"{layer}.mlp": {
            "experts": pytest.approx(1 - chosen / everything, abs=1e-12),
            "neurons": pytest.approx(1 - count / chosen, abs=1e-12),
            "both": pytest.approx(1 - count / everything, abs=1e-12),
        }
        for layer, count in working.items()
    }


@every_moe
@pytest.mark.parametrize("inside", ["dense", "drelu", "split"])
def test_both_levels_are_counted(family: str, inside: str) -> None:
    model = build(family)
    unfused_ffns(model)  # takes the experts apart
    if inside == "drelu":
        swap(model, Swap({"kind": "drelu"}), Conversion("donor"), text())
    elif inside == "split":
        model = converted(model)
    with numbers_at_work(model) as working:
        seen = evaluate(model, text(), batch_size=3)
    expected = by_hand(family, working)
    assert len(expected) == (1 if "qwen" in family else 2)  # their first layer is dense
    assert {name: asdict(levels) for name, levels in seen.moe_layers.items()} == expected
    assert seen.two_levels is not None
    mean = {
        level: sum(one[level].expected for one in expected.values()) / len(expected)
        for level in ("experts", "neurons", "both")
    }
    assert asdict(seen.two_levels) == pytest.approx(mean, abs=1e-12)
    least = {"dense": 0.0, "drelu": 0.6, "split": 0.7}[inside]  # dReLU: 3 of 4 at random
    assert least <= seen.two_levels.neurons <= least + 0.3


@every_moe
def test_what_routers_inside_experts_turn_off(family: str) -> None:
    model = converted(build(family))
    with record_routing(model) as routings:
        seen = evaluate(model, text(), batch_size=3)
    tokens, on = text().numel(), sum(routing.neurons_on for routing in routings)
    passed = VISITED[family] * tokens
    assert sum(routing.tokens for routing in routings) == passed
    assert len(expert_ffns(model)) == FFNS[family]
    assert seen.ffn_sparsity == pytest.approx(1 - on / (passed * NEURONS), abs=1e-12)
    assert seen.ffn_sparsity == pytest.approx(0.5, abs=0.1)

    assert seen.flops.ffn_dense == VISITED[family] * NEURON * NEURONS
    down = NEURON / 3  # gate and up of every neuron are known to an oracle
    assert seen.flops.ffn == pytest.approx(on * down / tokens)
    oracle = expert_ffns(model)[0].router.flops()
    assert seen.flops.router == VISITED[family] * oracle


def test_a_host_without_experts_has_no_levels() -> None:
    seen = evaluate(build("llama"), text())
    assert (seen.two_levels, seen.moe_layers) == (None, {})
    model, _ = routed(build("llama"))
    assert evaluate(model, text()).two_levels is None


def test_a_host_that_chooses_every_expert_has_nothing_off() -> None:
    seen = evaluate(build("olmoe", num_experts_per_tok=4), text())
    assert seen.two_levels == TwoLevels(0.0, 0.0)
    assert seen.two_levels.both == 0


def test_counting_leaves_nothing_behind() -> None:
    model = build("mixtral")
    evaluate(model, text())
    assert not any(module._forward_pre_hooks for module in model.modules())
