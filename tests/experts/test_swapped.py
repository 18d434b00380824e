"""Another activation in every family: what it computes, how it is saved, who refuses to load it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_tools.checkpoint import sizes
from moe_tools.checkpoint.loading import load, load_classifier
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.experts import every_expert_on
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.activations import ACTIVATIONS
from moe_tools.hosts.ffn import permute_neurons, unfused_ffns
from tests.families import (
    FAMILIES,
    MOE,
    NEURONS,
    THRESHOLD,
    UNGATED,
    aligned,
    build,
    force_on,
    host_gradients,
    host_tensors,
    is_router,
    load_stock,
    logits,
    model_inputs,
    randomize,
    said,
    stock,
    stored_shapes,
)
from tests.hosts.test_activations import SPECS

STOCK = [kind for kind in SPECS if ACTIVATIONS[kind].in_stock]
OURS = [kind for kind in SPECS if kind not in STOCK]
ACT_KEYS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
every_family = pytest.mark.parametrize("family", FAMILIES)


def possible(kinds: list[str]) -> pytest.MarkDecorator:
    """Every family with every kind that it can have."""
    pairs = [(f, k) for f in FAMILIES for k in kinds if k != "drelu" or f not in UNGATED]
    return pytest.mark.parametrize(("family", "kind"), pairs)


def conversion(kind: str) -> Conversion:
    return Conversion("donor", activation=SPECS[kind])


def swapped(donor: PreTrainedModel, kind: str) -> PreTrainedModel:
    model = copy.deepcopy(donor)
    swap_activations(model, conversion(kind))
    return model


class Formula(nn.Module):
    """The activations, spelled in another way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "relu" | "drelu":
                return torch.where(x > 0, x, 0)
            case "relu2":
                return torch.where(x > 0, x * x, 0)
            case "shifted_relu":
                return torch.where(x > 0.5, x - 0.5, 0)
            case "swish_beta":
                return x / 2
            case _:
                return torch.where(x >= 0.5, x, 0)


def twin(donor: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The host's own modules with the formula in place of the activation; the slow way."""
    model = copy.deepcopy(donor)
    for ffn in unfused_ffns(model):
        ffn.layer.set_submodule(ffn.layout.act, Formula(kind))
        if kind == "drelu":
            parts = ffn.projections
            parts.up.register_forward_hook(cut_both if parts.gate is parts.up else cut)
    for module in model.modules():
        if type(module).__name__ == "BertPredictionHeadTransform" and kind in STOCK:
            module.transform_act_fn = Formula(kind)
    return model.eval()


def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.relu()


def cut_both(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    gate, up = output.chunk(2, dim=-1)
    return torch.cat([gate, up.relu()], dim=-1)


def backward(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = model_inputs(model)
    scores = model(**inputs).logits
    nn.functional.cross_entropy(scores.flatten(0, 1), inputs["input_ids"].flatten()).backward()
    return host_gradients(model)


@possible(list(SPECS))
def test_a_swap_is_what_the_formula_says(family: str, kind: str) -> None:
    donor = build(family)
    expected = logits(twin(donor, kind))
    model = swapped(donor, kind)
    assert torch.equal(logits(model), expected)
    has_relu = kind == "relu" and family in ("opt", "t5-relu")
    assert ((logits(model) - logits(donor)).abs().max() > 1e-3) != has_relu


@possible(list(SPECS))
def test_gradients_are_those_of_the_formula(family: str, kind: str) -> None:
    donor = build(family)
    expected, actual = backward(twin(donor, kind)), backward(swapped(donor, kind))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@possible(STOCK)
def test_the_stock_class_computes_a_stock_activation(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = swapped(build(family), kind)
    save(model, tmp_path / "out")
    assert torch.equal(logits(stock(family, tmp_path / "out")), logits(model))
    if family not in MOE:  # `load` takes the default implementation of a host's experts
        assert torch.equal(logits(aligned(load(tmp_path / "out"))), logits(model))


@possible(OURS)
def test_the_stock_class_refuses_any_other(family: str, kind: str, tmp_path: Path) -> None:
    save(swapped(build(family), kind), tmp_path / "out")
    AutoConfig.from_pretrained(tmp_path / "out")  # a look at the config is no harm
    message = rf"'moe_tools\.{kind}: load this folder with moe_tools\.load'"
    with pytest.raises(KeyError, match=message):
        stock(family, tmp_path / "out")


@possible(OURS)
def test_a_folder_gives_the_model_back(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the room that a real model in bf16 has, of which tiny ones in fp32 have far more."""
    monkeypatch.setattr(sizes, "SPARE", 0)
    monkeypatch.setattr(sizes, "PER_BYTE", sizes.PER_BYTE // 2)
    donor = build(family)
    model = swapped(donor, kind)
    save(model, tmp_path / "out")
    loaded = aligned(load(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))
    assert read_conversion(loaded) == read_conversion(model)
    for key in ACT_KEYS:
        assert getattr(loaded.config, key, None) == getattr(model.config, key, None)
    save(loaded, tmp_path / "again")
    assert torch.equal(logits(aligned(load(tmp_path / "again"))), logits(model))


@possible(OURS)
def test_a_folder_keeps_the_host_names_and_shapes(family: str, kind: str, tmp_path: Path) -> None:
    donor = build(family)
    model = swapped(donor, kind)
    donor.save_pretrained(tmp_path / "donor", save_original_format=False)
    save(model, tmp_path / "out")
    assert stored_shapes(tmp_path / "out") == stored_shapes(tmp_path / "donor")


@possible(list(SPECS))
def test_a_swapped_model_converts_like_any_other(family: str, kind: str, tmp_path: Path) -> None:
    model = swapped(build(family), kind)
    dense = logits(model)
    for ffn in unfused_ffns(model):
        permute_neurons(ffn, torch.arange(NEURONS).flip(0))
    assert (logits(model) - dense).abs().max() <= 2e-6 * max(1.0, float(dense.abs().max()))
    reordered = logits(model)
    made = read_conversion(model)
    assert made is not None
    both = replace(THRESHOLD, activation=made.activation, stock_activation=made.stock_activation)
    attach_experts(model, both)
    force_on(model)
    assert torch.equal(logits(model), reordered)
    randomize(model)
    assert not torch.equal(logits(model), reordered)
    with every_expert_on(model):
        assert torch.equal(logits(model), reordered)
    save(model, tmp_path / "out")
    loaded = aligned(load(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))
    assert said(loaded) == both
    host = {k: v for k, v in model.state_dict().items() if is_router(k)}
    assert host and all(torch.equal(loaded.state_dict()[k], v) for k, v in host.items())


@possible(["drelu", "shifted_relu"])
def test_dropout_stays_where_the_host_has_it(family: str, kind: str) -> None:
    donor = build(family, dropout=0.5)
    outputs = []
    for model in (twin(donor, kind), swapped(donor, kind)):
        assert not any(module.training for module in model.modules())
        torch.manual_seed(7)
        outputs.append(logits(model.train()))
    assert torch.equal(*outputs)


@every_family
def test_one_swap_after_another(family: str, tmp_path: Path) -> None:
    donor = build(family)
    model, order = copy.deepcopy(donor), ["relu", "fatrelu", "drelu", "shifted_relu", "relu2"]
    for kind in order:
        if kind == "drelu" and family in UNGATED:
            continue
        swap_activations(model, conversion(kind))
        base = twin(donor, "relu") if family == "bert" and kind != "relu2" else donor
        assert torch.equal(logits(model), logits(twin(base, kind)))
        save(model, tmp_path / kind)
        if family not in MOE or kind in OURS:
            assert torch.equal(logits(aligned(load(tmp_path / kind))), logits(model))
        assert read_conversion(model).stock_activation == ("relu" if kind in OURS else None)
    assert torch.equal(logits(stock(family, tmp_path / "relu2")), logits(model))


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5-gated", "qwen2_moe"])
def test_every_ffn_can_have_its_own(family: str, tmp_path: Path) -> None:
    donor = build(family)
    names = [ffn.name for ffn in unfused_ffns(donor)]
    thetas = {name: 0.1 * index for index, name in enumerate(names)}
    own = {name: {"kind": "fatrelu", "theta": theta} for name, theta in thetas.items()}
    swap_activations(donor, Conversion("donor", activation={"kind": "fatrelu"}, activation_of=own))
    save(donor, tmp_path / "out")
    for model in (donor, load(tmp_path / "out")):
        found = {ffn.name: ffn.act.theta for ffn in unfused_ffns(model)}
        assert found == thetas
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), logits(donor))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_activation_of_an_ffn_that_is_not_there_is_an_error(family: str) -> None:
    model = build(family)
    before = logits(model)
    name = unfused_ffns(model)[1].name
    own = {f"{name}s": {"kind": "relu2"}}
    made = Conversion("donor", activation={"kind": "relu"}, activation_of=own)
    with pytest.raises(ValueError, match=rf"^unknown FFN in activation_of '{name}s'; did you mean"):
        swap_activations(model, made)
    assert torch.equal(logits(model), before)


def test_stock_kinds_that_differ_are_no_stock_model(tmp_path: Path) -> None:
    model = build("llama")
    own = {"model.layers.1.mlp": {"kind": "relu2"}}
    swap_activations(model, Conversion("donor", activation={"kind": "relu"}, activation_of=own))
    save(model, tmp_path / "out")
    with pytest.raises(KeyError, match=r"moe_tools\.relu: load this folder with moe_tools\.load"):
        stock("llama", tmp_path / "out")
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), logits(model))


@pytest.mark.parametrize("family", UNGATED)
def test_without_a_gate_there_is_no_drelu(family: str) -> None:
    model = build(family)
    before = logits(model)
    with pytest.raises(ValueError, match=r"has no gate, which DReLU needs: use relu or fatrelu$"):
        swap_activations(model, conversion("drelu"))
    assert torch.equal(logits(model), before)
    assert read_conversion(model) is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Conversion("donor"), "^unknown activation ''"),
        (Conversion("donor", activation={"kind": "drellu"}), "did you mean 'drelu'"),
        (
            Conversion(
                "donor",
                activation={"kind": "relu"},
                activation_of={"model.layers.1.mlp": {"kind": "fatrelu", "theta": -1}},
            ),
            "^theta is -1, but",
        ),
    ],
)
def test_a_wrong_activation_changes_nothing(block: Conversion, message: str) -> None:
    model = build("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        swap_activations(model, block)
    assert torch.equal(logits(model), before)
    assert read_conversion(model) is None


def test_a_routed_model_keeps_its_activation() -> None:
    model = build("llama")
    attach_experts(model, THRESHOLD)
    with pytest.raises(ValueError, match="is routed already: start from the dense model"):
        swap_activations(model, conversion("relu"))


def test_a_block_without_its_stock_name_is_refused(tmp_path: Path) -> None:
    save(swapped(build("llama"), "drelu"), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    del config["moe_tools"]["stock_activation"]
    file.write_text(json.dumps(config))
    message = r"^cannot load .*out: .*mlp.* has an activation .* lacks stock_activation$"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "out")


def test_a_swapped_language_model_becomes_a_swapped_classifier(tmp_path: Path) -> None:
    save(swapped(build("llama"), "drelu"), tmp_path / "out")
    model = load_classifier(str(tmp_path / "out"), ["no", "yes"], dtype=torch.float32)
    assert {type(ffn.act).__name__ for ffn in unfused_ffns(model)} == {"DReLU"}
    model.config.pad_token_id = 0
    assert logits(model).shape == (2, 2)


# --- the experts of an MoE host, in every way that transformers has to run them


RUNNABLE = ["eager", "batched_mm", "grouped_mm"]
"""The others need kernels for CUDA devices."""
every_way = pytest.mark.parametrize("way", RUNNABLE)
every_moe = pytest.mark.parametrize("family", MOE)


def test_every_way_to_run_experts_is_known() -> None:
    stock = set(ALL_EXPERTS_FUNCTIONS.keys()) - {"moe_tools"}  # another test may have added ours
    assert stock - {"deepgemm"} == {*RUNNABLE[1:], "sonicmoe"}  # it came after 5.7


@every_way
@every_moe
@pytest.mark.parametrize("kind", SPECS)
def test_a_swap_holds_in_every_way_to_run_experts(family: str, way: str, kind: str) -> None:
    donor = build(family)
    expected = logits(twin(donor, kind))
    donor.set_experts_implementation(way)
    model = swapped(donor, kind)
    assert torch.equal(logits(model), expected)
    other = swapped(build(family), kind)
    other.load_state_dict(model.state_dict())
    other.set_experts_implementation(way)  # after the swap, too
    assert torch.equal(logits(other), expected)
    assert (expected - logits(donor)).abs().max() > 1e-3


@every_way
@every_moe
def test_routers_hold_in_every_way_to_run_experts(family: str, way: str, tmp_path: Path) -> None:
    model = build(family)
    attach_experts(model, THRESHOLD)
    randomize(model)
    expected = logits(model)
    model.set_experts_implementation(way)
    assert torch.equal(logits(model), expected)
    save(model, tmp_path / "out")
    loaded = aligned(load(tmp_path / "out"))
    loaded.set_experts_implementation(way)
    assert torch.equal(logits(loaded), expected)


@every_moe
def test_the_stock_class_runs_a_stock_activation_in_every_way(family: str, tmp_path: Path) -> None:
    model = swapped(build(family), "relu")
    save(model, tmp_path / "out")
    for way in RUNNABLE:
        dense = load_stock(FAMILIES[family].model, tmp_path / "out", experts_implementation=way)
        assert (logits(dense) - logits(model)).abs().max() <= 2e-6


def test_experts_on_several_devices_are_refused() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    before = logits(model)
    with pytest.raises(ValueError, match="spread over devices: load the model without expert par"):
        swap_activations(model, conversion("relu"))
    model.model.layers[1].mlp.experts._is_expert_parallel = False
    assert torch.equal(logits(model), before)
    assert host_tensors(model).keys() == host_tensors(build("mixtral")).keys()
