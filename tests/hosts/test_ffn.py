"""Reading, reordering and grafting the FFNs of a host."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import (
    find_ffns,
    graft,
    host_state_dict,
    permute_neurons,
    unfused_ffns,
)
from moe_tools.hosts.layouts import Layout, host_names
from moe_tools.hosts.shapes import LAYOUTS
from moe_tools.measure.flops import forward_flops
from moe_tools.recipe import Train
from moe_tools.training.checks import check_train
from tests.families import FAMILIES, FUSED, MOE, NEURONS, build, logits

every_family = pytest.mark.parametrize("family", FAMILIES)
REVERSED = torch.arange(NEURONS).flip(0)


@every_family
def test_weights_are_views_of_the_host(family: str) -> None:
    model = build(family)
    before = logits(model)
    for ffn in find_ffns(model):
        assert len(ffn.weights().down_norm_F) == NEURONS
        with torch.no_grad():
            ffn.weights().down_FD.zero_()
        assert not ffn.weights().down_norm_F.any()
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_a_fused_linear_holds_gate_rows_then_up_rows(family: str) -> None:
    ffn = find_ffns(build(family))[0]
    weights, fused = ffn.weights(), ffn.part("gate_up_proj").get_parameter("weight")
    assert torch.equal(torch.cat([weights.gate_FD, weights.up_FD]), fused)
    assert weights.routing_FD is weights.gate_FD


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_some_neurons_are_those_of_all(family: str) -> None:
    projections, x_TD = find_ffns(build(family))[0].projections, torch.randn(2, 3, 16)
    h_TF = projections.hidden_TF(x_TD)
    few_K = torch.tensor([5, 0, 47])
    few_TK = projections.hidden_TK(x_TD, few_K)
    torch.testing.assert_close(few_TK, h_TF[..., few_K], rtol=1e-5, atol=1e-6)
    assert torch.equal(projections.hidden_TK(x_TD, REVERSED), h_TF[..., REVERSED])


def test_ungated_neurons_fire_by_their_up_rows() -> None:
    weights = find_ffns(build("gpt2"))[0].weights()
    assert weights.gate_FD is None
    assert weights.routing_FD is weights.up_FD


@every_family
def test_reordering_back_gives_the_same_weights(family: str) -> None:
    model = build(family)
    expected = {key: tensor.clone() for key, tensor in host_tensors(model).items()}
    for ffn in find_ffns(model):
        permute_neurons(ffn, REVERSED)
    assert any(
        not torch.equal(tensor, expected[key]) for key, tensor in host_tensors(model).items()
    )
    for ffn in find_ffns(model):
        permute_neurons(ffn, REVERSED)
    for key, tensor in host_tensors(model).items():
        assert torch.equal(tensor, expected[key]), key


def host_tensors(model: nn.Module) -> dict[str, Tensor]:
    return host_state_dict(model)


@pytest.mark.parametrize(
    "order_F",
    [torch.arange(NEURONS - 1), torch.arange(NEURONS) + 1, torch.zeros(NEURONS, dtype=torch.long)],
    ids=["short", "outside", "repeated"],
)
def test_what_is_no_permutation_is_refused_and_changes_nothing(order_F: Tensor) -> None:
    model = build("llama")
    before = logits(model)
    message = "^model.layers.0.mlp: the order is not a permutation of its 48 neurons$"
    with pytest.raises(ValueError, match=message):
        permute_neurons(find_ffns(model)[0], order_F)
    assert torch.equal(logits(model), before)


def test_grafting_bypasses_what_the_host_calls_outside_the_slot() -> None:
    model = build("bert")
    for ffn in find_ffns(model):
        graft(model, ffn, nn.Identity())
        assert isinstance(model.get_submodule(ffn.name), nn.Identity)
        assert isinstance(ffn.part("output.dense"), nn.Identity)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("family", "renames"),
    [
        ("llama", {}),
        (
            "opt",
            {
                "{}fc1.activation_fn.": "{}activation_fn.",
                "{}fc1.fc1.": "{}fc1.",
                "{}fc1.fc2.": "{}fc2.",
            },
        ),
        ("bert", {"{}intermediate.output_dense.": "{}output.dense."}),
    ],
    ids=["llama", "opt", "bert"],
)
def test_only_parts_that_moved_have_another_host_name(family: str, renames: dict[str, str]) -> None:
    prefix = {"llama": "", "opt": "model.decoder.layers.0.", "bert": "bert.encoder.layer.0."}
    ffn = find_ffns(build(family))[0]
    expected = {a.format(prefix[family]): b.format(prefix[family]) for a, b in renames.items()}
    assert host_names(ffn.name, ffn.layout) == expected


def test_taking_an_moe_host_apart_copies_no_weight() -> None:
    model = build("mixtral")
    fused = {
        name: parameter.untyped_storage().data_ptr()
        for name, parameter in model.named_parameters()
        if ".experts." in name
    }
    unfused_ffns(model)
    for name, storage in fused.items():
        holder, part = name.rsplit(".", 1)
        for expert in model.get_submodule(holder):
            weight = expert.get_submodule(part).get_parameter("weight")
            assert weight.untyped_storage().data_ptr() == storage


def test_taking_an_moe_host_apart_keeps_frozen_what_was_frozen() -> None:
    model = build("mixtral").requires_grad_(False)
    unfused_ffns(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_finding_twice_finds_the_same() -> None:
    model = build("mixtral")
    first, second = unfused_ffns(model), unfused_ffns(model)
    assert [ffn.name for ffn in first] == [ffn.name for ffn in second]
    assert [ffn.layer for ffn in first] == [ffn.layer for ffn in second]


def test_fused_tensors_come_back_in_order() -> None:
    model = build("mixtral")
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    find_ffns(twin)
    state = host_state_dict(twin)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_a_class_of_any_name_is_found_by_its_parts() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = type("SomeFeedForward", (type(layer.mlp),), {})
    assert [ffn.name for ffn in find_ffns(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_renamed_part_of_a_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Layout("up_proj", "down_proj", "act_fn", gate="old_gate")
    monkeypatch.setitem(LAYOUTS, "LlamaMLP", row)
    with pytest.raises(ValueError, match=r"^LlamaMLP of transformers \S+ has no old_gate: it was"):
        find_ffns(build("llama"))


@pytest.mark.parametrize("family", [*MOE, *FUSED])
def test_finding_takes_nothing_apart(family: str) -> None:
    """The experts that are found are views of what the host keeps fused; so are their gradients'
    flags. A check that changed the model would be no check."""
    model = build(family)
    before = {path: type(module) for path, module in model.named_modules()}
    found = find_ffns(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    expected = logits(model)
    for ffn in found:
        permute_neurons(ffn, REVERSED)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(model), expected)  # written to the fused weights themselves
    unfused = unfused_ffns(model)
    assert [ffn.name for ffn in unfused] == [ffn.name for ffn in found]
    for ffn, view in zip(unfused, found, strict=True):
        assert model.get_submodule(ffn.name) is ffn.layer
        for mine, other in zip(ffn.weights().matrices(), view.weights().matrices(), strict=True):
            assert mine.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_check_takes_nothing_apart(family: str) -> None:
    model = build(family)
    swap_activations(model, Conversion("donor", activation={"kind": "relu"}))
    save_type = {path: type(module) for path, module in model.named_modules()}
    check_train(model, Train(8, losses={"lm": 1.0, "l1": 1e-3}), None)
    fused = build(family)
    before = {path: type(module) for path, module in fused.named_modules()}
    check_train(fused, Train(8, losses={"lm": 1.0, "l1": 1e-3}), None)
    with pytest.raises(ValueError, match="counts exact zeros, but"):
        check_train(fused, Train(8, drive="l1", target_sparsity=0.5), None)
    forward_flops(fused, 16)
    assert {path: type(module) for path, module in fused.named_modules()} == before
    assert {path: type(module) for path, module in model.named_modules()} == save_type


def test_flops_are_the_same_fused_and_apart() -> None:
    model = build("mixtral")
    fused = forward_flops(model, 16)
    unfused_ffns(model)
    assert forward_flops(model, 16) == fused
