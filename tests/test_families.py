"""The exactness table: what a conversion promises, checked for every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import attach_experts, read_conversion, set_mode
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import find_ffns, permute_neurons
from moe_tools.hosts.projections import hidden_TF
from moe_tools.kernels.sparse_ffn import sparse_ffn
from moe_tools.measure.evaluate import evaluate
from moe_tools.recipe import Attach, Budget, Fit, Split
from moe_tools.steps.attach import attach
from moe_tools.steps.budget import budget
from moe_tools.steps.fit import fit
from moe_tools.steps.partition import random_partition
from moe_tools.steps.split import split
from tests.families import (
    EXPERTS,
    FUSED,
    MOE,
    NEURONS,
    ROUNDED,
    SIZES,
    SPLIT,
    TABLE,
    THRESHOLD,
    UNEVEN,
    UNFLAGGED,
    aligned,
    build,
    every_size,
    force_on,
    host_gradients,
    host_tensors,
    is_router,
    logits,
    model_inputs,
    of_size,
    per_neuron,
    randomize,
    routed,
    same,
    stock,
    stored_shapes,
)

SOFT = replace(THRESHOLD, mode="soft")
every_family = pytest.mark.parametrize("family", TABLE)
WITHOUT_BIASES = [name for name in (*MOE, *FUSED) if name != "gpt_oss"]


def backward(model: PreTrainedModel) -> None:
    """The gradients of a language-modelling loss."""
    inputs = model_inputs(model)
    scores = model(**inputs).logits
    nn.functional.cross_entropy(scores.flatten(0, 1), inputs["input_ids"].flatten()).backward()


def switch_constant(model: PreTrainedModel, size: int, rate: float = 0.5) -> list[Tensor]:
    """Each FFN gets experts that are off whatever the token; their neurons, one mask an FFN."""
    masks = []
    for ffn in expert_ffns(model):
        on_E = torch.rand(ffn.division.num_experts) > rate
        with torch.no_grad():
            ffn.router.weight.zero_()
            ffn.router.bias.copy_(torch.where(on_E, 1.0, -1.0))
        masks.append(per_neuron(on_E, size))
    return masks


@every_family
def test_every_ffn_is_found_once_with_its_neurons(family: str) -> None:
    ffns = find_ffns(build(family))
    assert len({ffn.name for ffn in ffns}) == len(ffns) >= 2
    for ffn in ffns:
        weights = ffn.weights()
        assert weights.up_FD.shape == weights.down_FD.shape == (NEURONS, 16)
        assert all(len(tensor) == NEURONS for tensor in weights.per_neuron())


@every_family
@every_size
def test_all_experts_on_gives_the_dense_logits(family: str, size: int) -> None:
    donor = build(family)
    assert all(p.count_nonzero() == p.numel() for p in donor.parameters())  # biases too
    model, ffns = routed(donor, of_size(size))
    assert {ffn.division.sizes for ffn in ffns} == {SIZES[size]}
    assert same(family, logits(model), logits(donor))


@pytest.mark.parametrize("family", [name for name in (*MOE, *FUSED) if name not in UNFLAGGED])
def test_an_moe_host_stays_close_to_the_default_implementation(family: str) -> None:
    donor = build(family)
    model, _ = routed(donor)
    donor.set_experts_implementation("grouped_mm")
    assert (logits(model) - logits(donor)).abs().max() <= 1e-6


@every_family
def test_a_fresh_router_turns_nothing_off(family: str) -> None:
    donor = build(family)
    model = copy.deepcopy(donor)
    attach_experts(model, THRESHOLD)
    assert same(family, logits(model), logits(donor))


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
@every_size
def test_soft_scores_of_one_give_the_dense_gradients(family: str, size: int) -> None:
    donor = build(family)
    model, ffns = routed(donor, of_size(size, SOFT))
    backward(donor)
    backward(model)
    expected, actual = host_gradients(donor), host_gradients(model)
    assert actual.keys() == expected.keys()
    # The shared expert reads what the others read: their gradients add up in another order.
    atol = 1e-7 if family in ("qwen2_moe", *ROUNDED) else 1e-8
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=atol, msg=name)
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
@every_size
def test_a_saved_model_loads_with_the_same_logits(family: str, size: int, tmp_path: Path) -> None:
    donor = build(family)
    model, _ = routed(donor, of_size(size))
    randomize(model)
    expected = logits(model)
    assert (expected - logits(donor)).abs().max() > 1e-3  # some experts are off
    save(model, tmp_path / "out")
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), expected)


@every_family
def test_uneven_experts_from_split_to_a_loaded_folder(family: str, tmp_path: Path) -> None:
    donor = build(family)
    model = copy.deepcopy(donor)
    text_BT = torch.randint(3, 64, (32, 16), generator=torch.Generator().manual_seed(2))
    split(model, Split(UNEVEN), text_BT, seed=0)
    attach(model, Attach(start_sparsity=0.3, when_off="mean"), of_size(UNEVEN, SPLIT), text_BT)
    trained = {key: value.clone() for key, value in model.state_dict().items() if is_router(key)}
    force_on(model)
    dense = logits(donor)
    assert (logits(model) - dense).abs().max() <= 2e-6 * max(1.0, float(dense.abs().max()))
    model.load_state_dict(trained, strict=False)
    expected = logits(model)
    assert (expected - dense).abs().max() > 1e-3  # some experts are off
    save(model, tmp_path / "out")
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), expected)


METHODS: dict[str, tuple[Split, Attach, Fit | None, Budget]] = {
    "moefication": (
        Split(UNEVEN, "kmeans", "weights", shared_experts=1),
        Attach("mlp", selector={"kind": "topk", "share": 0.5}, when_off="mean"),
        Fit(epochs=1, lr=1e-2, batch_size=128),
        Budget(0.4),
    ),
    "d2dmoe": (
        Split(UNEVEN, "coactivation", shared_experts=1),
        Attach("norm", {"hidden": 8}, {"kind": "dynamic_k", "tau": 0.9}),
        Fit(epochs=1, batch_size=128),
        Budget(0.4, "error"),
    ),
    "cmoe": (
        Split(UNEVEN, "kmeans", "marks", shared_experts=2),
        Attach("representative", selector={"kind": "topk", "share": 0.5}),
        None,
        Budget(0.4),
    ),
}


@every_family
@pytest.mark.parametrize("method", METHODS)
def test_a_method_from_split_to_a_loaded_folder(family: str, method: str, tmp_path: Path) -> None:
    """Every expert on is the donor; what is reported off is off; a folder gives it all back."""
    split_step, attach_step, fit_step, budget_step = METHODS[method]
    donor = build(family)
    model = copy.deepcopy(donor)
    text_BT = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(2))
    split(model, split_step, text_BT, seed=0)
    shared = split_step.shared_experts
    attach(model, attach_step, replace(SPLIT, expert_size=UNEVEN, shared_experts=shared), text_BT)
    if fit_step is not None:
        fit(model, fit_step, text_BT, tmp_path / "work")
    reached = budget(model, budget_step, text_BT)["sparsity"]
    dense = logits(donor)
    with every_expert_on(model):
        assert (logits(model) - dense).abs().max() <= 2e-6 * max(1.0, float(dense.abs().max()))
    assert (logits(model) - dense).abs().max() > 1e-3
    assert reached == pytest.approx(0.4, abs=0.12)  # whole experts a token, 3 or 4 of them routed

    with record_routing(model) as routings:
        seen = evaluate(model, text_BT, mask_token=3)
    on, neurons = 0, 0
    for routing in routings:
        assert routing.mask_TE[..., :shared].all()
        on += int(per_neuron(routing.mask_TE, UNEVEN).sum())
        neurons += routing.mask_TE[..., 0].numel() * NEURONS
    assert seen.ffn_sparsity == pytest.approx(1 - on / neurons, abs=1e-12)
    if model.can_generate():  # an encoder sees other tokens: some are masked
        assert seen.ffn_sparsity == pytest.approx(reached, abs=1e-3)

    save(model, tmp_path / "out")
    loaded = aligned(load(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(aligned(model)))
    assert read_conversion(loaded) == read_conversion(model)


@every_family
def test_the_stock_class_loads_the_folder_as_the_dense_model(family: str, tmp_path: Path) -> None:
    model, _ = routed(build(family))
    randomize(model)
    save(model, tmp_path / "out")
    force_on(model)
    dense = stock(family, tmp_path / "out")
    assert not expert_ffns(dense)
    assert same(family, logits(dense), logits(model))


@every_family
def test_the_folder_keeps_the_host_names_and_shapes(family: str, tmp_path: Path) -> None:
    donor = build(family)
    model, ffns = routed(donor)
    # Only here does it differ from the default: Mixtral's is one tensor an expert.
    donor.save_pretrained(tmp_path / "donor", save_original_format=False)
    save(model, tmp_path / "out")
    stored = stored_shapes(tmp_path / "out")
    expected = stored_shapes(tmp_path / "donor")
    # "in": a host may call its own router so, too
    host = {key: stored[key] for key in stored if key in expected or not is_router(key)}
    assert host == expected
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
    assert same(family, outputs[0], outputs[1])
    assert not torch.equal(logits(model), logits(model))
    assert same(family, logits(model.eval()), logits(donor.eval()))


@every_family
@every_size
def test_experts_off_equal_neurons_removed_by_hand(family: str, size: int) -> None:
    donor = build(family)
    model, _ = routed(donor, of_size(size))
    masks = switch_constant(model, size)
    before = logits(donor)
    for ffn, on_F in zip(find_ffns(donor), masks, strict=True):
        with torch.no_grad():
            ffn.weights().down_FD[~on_F] = 0.0
    assert same(family, logits(model), logits(donor))
    assert not torch.equal(before, logits(donor))


@every_family
@every_size
def test_each_token_gets_its_own_experts(family: str, size: int) -> None:
    donor = build(family)
    model, ffns = routed(donor, of_size(size))
    randomize(model)
    act = {ffn.name: ffn.act for ffn in find_ffns(donor)}
    for ffn in ffns:
        x_TD = torch.randn(3, 5, 16)
        with torch.no_grad():
            mask_TF = per_neuron(ffn.route(x_TD).mask_TE, size)
            assert 0 < mask_TF.float().mean() < 1
            weights = ffn.weights()
            up_TF = nn.functional.linear(x_TD, weights.up_FD, weights.up_F)
            gate_TF = None
            if weights.gate_FD is not None:
                gate_TF = nn.functional.linear(x_TD, weights.gate_FD, weights.gate_F)
            h_TF = hidden_TF(act[ffn.name], up_TF, gate_TF)
            h_TF[~mask_TF] = 0.0
            expected = nn.functional.linear(h_TF, weights.down_FD.T, weights.down_D)
            torch.testing.assert_close(ffn(x_TD), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma", "phi3", *WITHOUT_BIASES])
@pytest.mark.parametrize("mode", ["hard", "soft"])
@every_size
def test_an_ffn_without_biases_is_sparse_ffn(family: str, mode: str, size: int) -> None:
    model, ffns = routed(build(family), replace(THRESHOLD, mode=mode, expert_size=size))
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
    if TABLE[family].stock and family not in UNFLAGGED:
        donor.set_experts_implementation("eager")
    model, _ = routed(donor)
    expected = {key: tensor.dtype for key, tensor in host_tensors(donor).items()}
    assert torch.bfloat16 in expected.values()  # beside numbers that the host keeps in fp32
    assert {key: tensor.dtype for key, tensor in host_tensors(model).items()} == expected
    error = (logits(model) - logits(aligned(donor))).abs().max()
    # nemotron_h adds the experts of a token up in fp32, we in bf16
    rounded = family in (*ROUNDED, "nemotron_h")
    assert error <= (2**-6 * float(logits(donor).abs().max()) if rounded else 0)
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
def test_a_model_without_ffns_is_named(
    unsupported: type[nn.Module], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    message = f"^{name} has no FFN that moe-tools can find: .*docs/families.md has the families$"
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
