"""The exactness table: what a conversion promises, checked for every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from moe_tools.kernels.sparse_ffn import sparse_ffn
from moe_tools.model.checkpoint import load, save
from moe_tools.model.conversion import attach_experts, set_mode
from moe_tools.model.experts import expert_ffns
from moe_tools.model.ffn import LAYOUTS, find_ffns, permute_neurons
from moe_tools.model.partition import random_partition
from tests.families import (
    EXPERT_SIZE,
    EXPERTS,
    FAMILIES,
    NEURONS,
    THRESHOLD,
    aligned,
    build,
    force_on,
    host_gradients,
    host_tensors,
    is_router,
    logits,
    model_inputs,
    randomize,
    routed,
    stock,
    stored_shapes,
)

SOFT = replace(THRESHOLD, mode="soft")
every_family = pytest.mark.parametrize("family", FAMILIES)


def backward(model: PreTrainedModel) -> None:
    """The gradients of a language-modelling loss."""
    inputs = model_inputs(model)
    scores = model(**inputs).logits
    nn.functional.cross_entropy(scores.flatten(0, 1), inputs["input_ids"].flatten()).backward()


def switch_constant(model: PreTrainedModel, rate: float = 0.5) -> list[Tensor]:
    """Each FFN gets experts that are off whatever the token; their neurons, one mask an FFN."""
    masks = []
    for ffn in expert_ffns(model):
        on_E = torch.rand(EXPERTS) > rate
        with torch.no_grad():
            ffn.router.weight.zero_()
            ffn.router.bias.copy_(torch.where(on_E, 1.0, -1.0))
        masks.append(on_E.repeat_interleave(EXPERT_SIZE))
    return masks


def test_every_layout_row_has_a_family() -> None:
    holders = {type(ffn.layer).__name__ for name in FAMILIES for ffn in find_ffns(build(name))}
    assert holders == set(LAYOUTS)


@every_family
def test_every_ffn_is_found_once_with_its_neurons(family: str) -> None:
    ffns = find_ffns(build(family))
    assert len({ffn.name for ffn in ffns}) == len(ffns) >= 2
    for ffn in ffns:
        weights = ffn.weights()
        assert weights.up_FD.shape == weights.down_FD.shape == (NEURONS, 16)
        assert all(len(tensor) == NEURONS for tensor in weights.per_neuron())


@every_family
def test_all_experts_on_gives_the_dense_logits(family: str) -> None:
    donor = build(family)
    assert all(p.count_nonzero() == p.numel() for p in donor.parameters())  # biases too
    model, _ = routed(donor)
    assert torch.equal(logits(model), logits(donor))


def test_mixtral_stays_close_to_the_default_implementation() -> None:
    donor = build("mixtral")
    model, _ = routed(donor)
    donor.set_experts_implementation("grouped_mm")
    assert (logits(model) - logits(donor)).abs().max() <= 1e-6


@every_family
def test_a_fresh_router_turns_nothing_off(family: str) -> None:
    donor = build(family)
    model = copy.deepcopy(donor)
    attach_experts(model, THRESHOLD)
    assert torch.equal(logits(model), logits(donor))


@every_family
def test_reordering_neurons_moves_the_logits_by_rounding_only(family: str) -> None:
    donor = build(family)
    model = copy.deepcopy(donor)
    for seed, ffn in enumerate(find_ffns(model)):
        before = ffn.weights().up_FD.clone()
        order_F = random_partition(NEURONS, EXPERTS, seed).order_F
        permute_neurons(ffn, order_F)
        assert torch.equal(ffn.weights().up_FD, before[order_F])
    assert (logits(model) - logits(donor)).abs().max() <= 2e-6


@every_family
def test_soft_scores_of_one_give_the_dense_gradients(family: str) -> None:
    donor = build(family)
    model, ffns = routed(donor, SOFT)
    backward(donor)
    backward(model)
    expected, actual = host_gradients(donor), host_gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-8, msg=name)
    for ffn in ffns:
        assert all(tensor.grad is not None for tensor in ffn.parameters()), ffn.name


@every_family
def test_soft_routers_get_a_gradient(family: str) -> None:
    model, ffns = routed(build(family), SOFT)
    randomize(model)
    backward(model)
    for ffn in ffns:
        for name, parameter in ffn.named_parameters():
            assert parameter.grad is not None, (ffn.name, name)
            assert parameter.grad.count_nonzero() > 0, (ffn.name, name)


@every_family
def test_a_saved_model_loads_with_the_same_logits(family: str, tmp_path: Path) -> None:
    donor = build(family)
    model, _ = routed(donor)
    randomize(model)
    expected = logits(model)
    assert (expected - logits(donor)).abs().max() > 1e-3  # some experts are off
    save(model, tmp_path / "out")
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), expected)


@every_family
def test_the_stock_class_loads_the_folder_as_the_dense_model(family: str, tmp_path: Path) -> None:
    model, _ = routed(build(family))
    randomize(model)
    save(model, tmp_path / "out")
    force_on(model)
    dense = stock(family, tmp_path / "out")
    assert not expert_ffns(dense)
    assert torch.equal(logits(dense), logits(model))


@every_family
def test_the_folder_keeps_the_host_names_and_shapes(family: str, tmp_path: Path) -> None:
    donor = build(family)
    model, ffns = routed(donor)
    # Only here does it differ from the default: Mixtral's is one tensor an expert.
    donor.save_pretrained(tmp_path / "donor", save_original_format=False)
    save(model, tmp_path / "out")
    stored = stored_shapes(tmp_path / "out")
    host = {key: shape for key, shape in stored.items() if not is_router(key)}
    assert host == stored_shapes(tmp_path / "donor")
    added = {f"{ffn.name}.router.{part}" for ffn in ffns for part in ("weight", "bias")}
    assert stored.keys() - host.keys() == added


@every_family
def test_a_reordered_dense_model_keeps_its_names(family: str, tmp_path: Path) -> None:
    model = build(family)
    for ffn in find_ffns(model):
        permute_neurons(ffn, random_partition(NEURONS, EXPERTS, 0).order_F)
    save(model, tmp_path / "out")
    assert torch.equal(logits(stock(family, tmp_path / "out")), logits(model))
    # `load` takes the default implementation of Mixtral's experts.
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() <= 1e-6


@every_family
def test_dropout_stays_where_the_host_has_it(family: str) -> None:
    donor = build(family, dropout=0.5)
    model, _ = routed(donor)
    assert torch.equal(logits(model), logits(model))
    outputs = []
    for either in (donor.train(), model.train()):
        torch.manual_seed(7)
        outputs.append(logits(either))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(donor.eval()))


@every_family
def test_experts_off_equal_neurons_removed_by_hand(family: str) -> None:
    donor = build(family)
    model, _ = routed(donor)
    masks = switch_constant(model)
    before = logits(donor)
    for ffn, on_F in zip(find_ffns(donor), masks, strict=True):
        with torch.no_grad():
            ffn.weights().down_FD[~on_F] = 0.0
    assert torch.equal(logits(model), logits(donor))
    assert not torch.equal(before, logits(donor))


@every_family
def test_each_token_gets_its_own_experts(family: str) -> None:
    donor = build(family)
    model, ffns = routed(donor)
    randomize(model)
    act = {ffn.name: ffn.act for ffn in find_ffns(donor)}
    for ffn in ffns:
        x_TD = torch.randn(3, 5, 16)
        with torch.no_grad():
            mask_TF = ffn.route(x_TD).mask_TE.repeat_interleave(EXPERT_SIZE, dim=-1)
            assert 0 < mask_TF.float().mean() < 1
            weights = ffn.weights()
            up_TF = nn.functional.linear(x_TD, weights.up_FD, weights.up_F)
            if weights.gate_FD is None:
                h_TF = act[ffn.name](up_TF)
            else:
                gate_TF = nn.functional.linear(x_TD, weights.gate_FD, weights.gate_F)
                h_TF = act[ffn.name](gate_TF) * up_TF
            h_TF[~mask_TF] = 0.0
            expected = nn.functional.linear(h_TF, weights.down_FD.T, weights.down_D)
            torch.testing.assert_close(ffn(x_TD), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma", "phi3", "mixtral"])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_an_ffn_without_biases_is_sparse_ffn(family: str, mode: str) -> None:
    model, ffns = routed(build(family), replace(THRESHOLD, mode=mode))
    randomize(model)
    for ffn in ffns:
        x_TD = torch.randn(3, 5, 16)
        weights = ffn.weights()
        with torch.no_grad():
            routing = ffn.route(x_TD)
            mask_TE = routing.mask_TE if mode == "hard" else routing.scores_TE
            expected = sparse_ffn(
                x_TD,
                weights.up_FD,
                weights.down_FD,
                mask_TE,
                gate_FD=weights.gate_FD,
                act=ffn.get_submodule(ffn.layout.act),
            )
            torch.testing.assert_close(ffn(x_TD), expected, rtol=1e-5, atol=1e-6)


@every_family
def test_a_copy_is_independent(family: str) -> None:
    model, _ = routed(build(family))
    randomize(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    set_mode(twin, "soft")
    assert torch.equal(logits(model), expected)
    assert {ffn.mode for ffn in expert_ffns(model)} == {"hard"}


@every_family
def test_bfloat16_is_as_exact_and_keeps_routers_in_float32(family: str, tmp_path: Path) -> None:
    save(build(family), tmp_path / "donor")
    donor = load(tmp_path / "donor", dtype=torch.bfloat16)
    if FAMILIES[family].stock:
        donor.set_experts_implementation("eager")
    model, _ = routed(donor)
    assert {tensor.dtype for tensor in host_tensors(model).values()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(aligned(donor)))
    randomize(model)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert {ffn.router.weight.dtype for ffn in expert_ffns(loaded)} == {torch.float32}
    assert torch.equal(logits(aligned(loaded)), logits(model))


def test_the_cache_changes_no_generated_token() -> None:
    model, _ = routed(build("llama"))
    randomize(model)
    prompt = model_inputs(model)["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert cached.shape == (2, 9 + 12)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))


@pytest.mark.parametrize("unsupported", [mamba, nn.Module], ids=["MambaForCausalLM", "Module"])
def test_an_unsupported_model_is_named_with_what_is_supported(
    unsupported: type[nn.Module], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    message = f"^{name} has no FFN that moe-tools knows; supported: llama, mistral, .*mixtral$"
    with pytest.raises(ValueError, match=message):
        find_ffns(unsupported())
    with pytest.raises(ValueError, match=message):
        attach_experts(unsupported(), THRESHOLD)


@every_family
def test_a_routed_model_is_not_converted_again(family: str) -> None:
    model, _ = routed(build(family))
    expected = logits(model)
    with pytest.raises(ValueError, match="is routed already: start from the dense model"):
        attach_experts(model, THRESHOLD)
    assert torch.equal(logits(model), expected)
