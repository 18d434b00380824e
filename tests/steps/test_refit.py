"""Refit solves what it says, changes nothing where nothing is off, and survives its folder."""

from __future__ import annotations

import copy
import importlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import (
    Conversion,
    attach_experts,
    read_conversion,
    write_conversion,
)
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.selectors import Threshold
from moe_tools.hosts.ffn import find_ffns
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.few_bits import StoredBits, store_rows
from moe_tools.recipe import Refit
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.refit import refit
from tests.coded import quantise_ffns
from tests.families import (
    EXPERT_SIZE,
    MOE,
    NEURONS,
    ROUNDED,
    TABLE,
    UNEVEN,
    aligned,
    build,
    logits,
    randomize,
    routed,
    stock,
)

refit_module = importlib.import_module(refit.__module__)
HALF = {"kind": "topk", "share": 0.5}
property_test = settings(deadline=None, max_examples=25, derandomize=True, database=None)


def text(rows: int = 16, length: int = 32) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Case:
    """A routed model with random routers, the same on every call."""

    size: int = EXPERT_SIZE
    router: str = "sigmoid"
    mode: Any = "hard"
    when_off: Any = "zero"
    shared: int = 0
    family: str = "llama"
    dtype: torch.dtype = torch.float32

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model = build(self.family).to(self.dtype)
        conversion = Conversion(
            "donor", self.size, self.router, HALF, self.mode, self.when_off, self.shared
        )
        for ffn in attach_experts(model, conversion):
            if ffn.off_F is not None:
                ffn.off_F.normal_(std=0.1)
        if self.router == "sigmoid":
            randomize(model)
        return model


cases = st.builds(
    Case,
    size=st.sampled_from([EXPERT_SIZE, UNEVEN, 1]),
    router=st.sampled_from(["sigmoid", "oracle"]),
    mode=st.sampled_from(["hard", "straight"]),
    when_off=st.sampled_from(["zero", "mean"]),
    shared=st.sampled_from([0, 2]),
    dtype=st.just(torch.float64),
)


def dense_activations(model: PreTrainedModel, blocks_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x_TD and h_TF of every FFN, every expert on."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in expert_ffns(model)]
    visit_activations(model, blocks_BT, lambda i, x_TD, h_TF: seen[i].append((x_TD, h_TF)))
    return [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in seen]


def mask_TE(ffn: ExpertFFN, x_TD: Tensor) -> Tensor:
    return ffn.route(x_TD).mask_TE


def features_TK(ffn: ExpertFFN, x_TD: Tensor, h_TF: Tensor, constants: bool) -> Tensor:
    """What the output is a product of, expert by expert."""
    on_TE = mask_TE(ffn, x_TD)
    off_F = torch.zeros(NEURONS).to(h_TF) if ffn.off_F is None else ffn.off_F
    pieces = zip(h_TF.split(ffn.division.sizes, -1), off_F.split(ffn.division.sizes), strict=True)
    found = [torch.where(on_TE[:, e, None], h, off) for e, (h, off) in enumerate(pieces)]
    if constants:
        found.append(torch.ones(len(x_TD), 1).to(h_TF))
    if constants and ffn.division.sizes[0] > 1:
        found.append((~on_TE[:, ffn.shared :]).to(h_TF))
    return torch.cat(found, dim=1)


def held_KD(ffn: ExpertFFN, features: int) -> Tensor:
    """What a solution is pulled to: the weights, and constants of 0."""
    down_FD = ffn.weights().down_FD.detach()
    return nn.functional.pad(down_FD, (0, 0, 0, features - NEURONS))


def solution_KD(ffn: ExpertFFN) -> Tensor:
    parts = [ffn.weights().down_FD.detach(), ffn.bias_D, ffn.off_RD]
    return torch.cat([part.reshape(-1, 16) for part in parts if part is not None])


# --- what is solved


@property_test
@given(cases, st.booleans(), st.sampled_from([1e-3, 0.1, 3.0]))
def test_it_is_least_squares_with_a_row_for_each_weight_that_is_held(
    case: Case, constants: bool, ridge: float
) -> None:
    before, model = case.model(), case.model()
    refit(model, Refit(ridge, constants), text())
    seen = dense_activations(before, text())
    for ffn, found, (x_TD, h_TF) in zip(expert_ffns(before), expert_ffns(model), seen, strict=True):
        z_TK = features_TK(ffn, x_TD, h_TF, constants)
        y_TD = h_TF @ ffn.weights().down_FD.detach()
        weight = (ridge * z_TK[:, :NEURONS].square().sum(0).mean()).sqrt()
        rows = torch.cat([z_TK, weight * torch.eye(z_TK.shape[1]).to(z_TK)])
        values = torch.cat([y_TD, weight * held_KD(ffn, z_TK.shape[1])])
        expected_KD, *_ = np.linalg.lstsq(rows.numpy(), values.numpy(), rcond=None)
        np.testing.assert_allclose(solution_KD(found).numpy(), expected_KD, rtol=1e-7, atol=1e-9)


@property_test
@given(cases, st.booleans(), st.sampled_from([1e-9, 1e-4, 0.1, 100.0]))
def test_no_error_grows_and_the_reported_one_is_the_model_s(
    case: Case, constants: bool, ridge: float
) -> None:
    before, model = case.model(), case.model()
    measured = refit(model, Refit(ridge, constants), text())
    seen = dense_activations(before, text())
    for ffn, new, (x_TD, h_TF) in zip(expert_ffns(before), expert_ffns(model), seen, strict=True):
        errors = measured["errors"][ffn.name]
        down_FD, on_TE = ffn.weights().down_FD.detach(), mask_TE(ffn, x_TD)
        y_TD = h_TF @ down_FD
        new.interventions.append(lambda _, on_TE=on_TE: on_TE)  # the oracle's would be others
        for when, one in (("before", ffn), ("after", new)):
            lost_TD = one(x_TD).detach() - ffn.weights().down_D.detach() - y_TD
            found = float(lost_TD.square().sum() / y_TD.square().sum())
            assert found == pytest.approx(errors[when], rel=1e-6)
        assert errors["after"] <= errors["before"] * (1 + 1e-9)
    for when in ("before", "after"):
        each = [errors[when] for errors in measured["errors"].values()]
        assert measured["mean"][when] == pytest.approx(np.mean(each))


@pytest.mark.parametrize("size", [EXPERT_SIZE, UNEVEN])
def test_constants_contain_what_the_mean_of_a_neuron_adds(size: int) -> None:
    mean, zero = (Case(size, when_off=off, dtype=torch.float64).model() for off in ("mean", "zero"))
    for ffn, (_, h_TF) in zip(expert_ffns(mean), dense_activations(mean, text()), strict=True):
        ffn.off_F.copy_(h_TF.mean(0))
    compensated = refit(mean, Refit(), text())["errors"]
    found = refit(zero, Refit(ridge=1e-6), text())["errors"]
    for name in found:
        assert found[name]["after"] < compensated[name]["before"]


@torch.no_grad()
def test_a_masked_model_of_soft_scores_is_solved_as_it_computes() -> None:
    case = Case(mode="soft", dtype=torch.float64)
    before, model = case.model(), case.model()
    measured = refit(model, Refit(), text())
    for ffn, new, (x_TD, h_TF) in zip(
        expert_ffns(before), expert_ffns(model), dense_activations(before, text()), strict=True
    ):
        dense_TD = h_TF @ ffn.weights().down_FD + ffn.weights().down_D
        lost = (new(x_TD) - dense_TD).square().sum() / (
            dense_TD - ffn.weights().down_D
        ).square().sum()
        errors = measured["errors"][ffn.name]
        assert float(lost) == pytest.approx(errors["after"], rel=1e-6)
        assert errors["after"] < 0.7 * errors["before"]


# --- where nothing is to be changed


@pytest.mark.parametrize("constants", [True, False])
@pytest.mark.parametrize("when_off", ["zero", "mean"])
def test_with_every_neuron_on_it_changes_no_bit(when_off: str, constants: bool) -> None:
    model = Case(when_off=when_off).model()
    for ffn in expert_ffns(model):
        ffn.selector = replace(ffn.selector, share=1.0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    exact = logits(model)
    measured = refit(model, Refit(constants=constants), text())
    assert measured["mean"] == {"before": 0, "after": 0}
    assert torch.equal(logits(model), exact)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.get(key, torch.zeros_like(tensor))), key


@pytest.mark.parametrize("size", [EXPERT_SIZE, 1])
@pytest.mark.parametrize("when_off", ["zero", "mean"])
def test_a_large_ridge_gives_the_model_back(when_off: str, size: int) -> None:
    model = Case(size, when_off=when_off).model()
    exact = logits(model)
    refit(model, Refit(ridge=1e9), text())
    torch.testing.assert_close(logits(model), exact, rtol=1e-5, atol=1e-6)
    model = Case(size, when_off=when_off).model()
    refit(model, Refit(), text())
    assert (logits(model) - exact).abs().max() > 1e-2


def test_an_ffn_that_is_all_off_gets_a_bias_alone() -> None:
    model = Case(dtype=torch.float64).model()
    donor = copy.deepcopy(model)
    for ffn in expert_ffns(model):
        ffn.selector = Threshold(2.0)  # no score is above 1
    refit(model, Refit(ridge=1e-9), text())
    for ffn, old, (_, h_TF) in zip(
        expert_ffns(model), expert_ffns(donor), dense_activations(donor, text()), strict=True
    ):
        assert torch.equal(ffn.weights().down_FD, old.weights().down_FD)
        mean_D = (h_TF @ old.weights().down_FD).mean(0)
        constant_D = ffn.bias_D + ffn.off_RD.sum(0)
        torch.testing.assert_close(constant_D, mean_D, rtol=1e-6, atol=1e-8)


# --- every kind of model


@pytest.mark.parametrize("family", TABLE)
def test_every_family_from_a_refit_to_its_folder(family: str, tmp_path: Path) -> None:
    model, ffns = routed(build(family), Conversion("donor", UNEVEN, "sigmoid", HALF))
    randomize(model)
    masked = logits(model)
    measured = refit(model, Refit(), text())
    assert set(measured["errors"]) == {ffn.name for ffn in ffns}
    for name, errors in measured["errors"].items():
        assert errors["after"] < 0.95 * errors["before"], name
    expected = logits(model)
    assert (expected - masked).abs().max() > 1e-3
    conversion = read_conversion(model)
    assert conversion is not None and conversion.constants

    save(model, tmp_path / "out")
    loaded = aligned(load(tmp_path / "out"))
    assert torch.equal(logits(loaded), expected)
    assert read_conversion(loaded) == conversion
    assert {tuple(ffn.off_RD.shape) for ffn in expert_ffns(loaded)} == {(5, 16)}
    stock(family, tmp_path / "out")  # leaves our tensors alone


@pytest.mark.parametrize("size", [UNEVEN, 1])
@pytest.mark.parametrize("family", [name for name in TABLE if name not in (*ROUNDED, "beam")])
def test_an_optimised_model_computes_the_same(family: str, size: int) -> None:
    model, _ = routed(build(family), Conversion("donor", size, "sigmoid", HALF, shared_experts=1))
    randomize(model)
    refit(model, Refit(), text())
    before = logits(model)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fast = optimize(aligned(model))
    torch.testing.assert_close(logits(fast), before, rtol=1e-4, atol=2e-5)
    for key, tensor in fast.state_dict().items():
        assert torch.equal(tensor, kept[key]), key


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated", MOE[0]])
def test_bf16_stays_bf16_and_gets_better(family: str, tmp_path: Path) -> None:
    save(build(family), tmp_path / "donor")
    model = load(tmp_path / "donor", dtype=torch.bfloat16)
    attach_experts(model, Conversion("donor", UNEVEN, "sigmoid", HALF))
    randomize(model)
    measured = refit(model, Refit(), text())
    assert measured["mean"]["after"] < 0.7 * measured["mean"]["before"]
    for ffn in expert_ffns(model):
        assert ffn.weights().down_FD.dtype == ffn.bias_D.dtype == ffn.off_RD.dtype == torch.bfloat16
    save(model, tmp_path / "out")
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), logits(aligned(model)))


def test_layers_that_share_their_weights_are_solved_once_for_all_tokens() -> None:
    torch.manual_seed(0)
    model = build("llama").double()
    first, second = (layer.mlp for layer in model.model.layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(second, name, getattr(first, name))
    (ffn,) = attach_experts(model, Conversion("donor", 8, "oracle", HALF))
    before = copy.deepcopy(model)
    refit(model, Refit(), text())
    (old,), ((x_TD, h_TF),) = expert_ffns(before), dense_activations(before, text())
    assert len(x_TD) == 2 * text().numel()
    z_TK = features_TK(old, x_TD, h_TF, constants=True)
    gram_KK = z_TK.T @ z_TK
    held = 0.1 * gram_KK.diagonal()[:NEURONS].mean()
    y_TD, held_to_KD = h_TF @ old.weights().down_FD, held_KD(old, len(gram_KK))
    expected_KD = torch.linalg.solve(
        gram_KK + held * torch.eye(len(gram_KK)).double(), z_TK.T @ y_TD + held * held_to_KD
    )
    torch.testing.assert_close(solution_KD(ffn), expected_KD, rtol=1e-7, atol=1e-9)


def test_where_only_the_host_computes_h_the_solution_is_the_same() -> None:
    solved = []
    for masked in (False, True):
        torch.manual_seed(0)
        model = build("llama")
        (layout,) = {ffn.layout for ffn in find_ffns(model)}
        row = layout.as_masked() if masked else layout
        conversion = Conversion("donor", 8, "sigmoid", HALF, layouts={"LlamaMLP": row.to_dict()})
        attach_experts(model, conversion)
        torch.manual_seed(1)
        randomize(model)
        refit(model, Refit(), text())
        solved.append((logits(model), [solution_KD(ffn) for ffn in expert_ffns(model)]))
    for one, other in zip(solved[0][1], solved[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(solved[0][0], solved[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["sigmoid", "oracle"])
def test_more_passes_for_less_memory_solve_the_same(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written before all is solved: masks and inputs are those of the donor."""
    whole, parts = Case(router=router).model(), Case(router=router).model()
    expected = refit(whole, Refit(), text())
    monkeypatch.setattr(refit_module, "SUM_BYTES", 1)
    assert refit(parts, Refit(), text()) == expected
    pairs = itertools.zip_longest(whole.state_dict().items(), parts.state_dict().items())
    for (key, one), (name, other) in pairs:
        assert key == name and torch.equal(one, other), key


def test_it_leaves_selectors_modes_and_hooks_as_they_were() -> None:
    model = Case(mode="straight", router="oracle").model()
    kept = [(ffn.selector, ffn.mode) for ffn in expert_ffns(model)]
    refit(model, Refit(), text())
    assert [(ffn.selector, ffn.mode) for ffn in expert_ffns(model)] == kept
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- what is refused


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^refit needs routers: put `attach` before it in the rec"
    ):
        refit(build("llama"), Refit(), text())


def test_a_second_refit_is_refused() -> None:
    model = Case().model()
    refit(model, Refit(), text())
    exact = logits(model)
    with pytest.raises(ValueError, match=r"^refit: the model has been refitted, .* refit once"):
        refit(model, Refit(), text())
    assert torch.equal(logits(model), exact)


def test_thresholds_are_refused() -> None:
    model = Case().model()
    conversion = read_conversion(model)
    assert conversion is not None
    write_conversion(model, replace(conversion, thresholds={"model.layers.0.mlp": {}}))
    with pytest.raises(ValueError, match="has thresholds as well: put `refit` before `threshold`"):
        Refit().rehearse(model, "donor")


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_weights_are_stored_again(bits: StoredBits) -> None:
    model = Case().model()
    with torch.no_grad():
        for ffn in expert_ffns(model):
            for rows_FD in ffn.found.views().matrices():
                rows_FD.copy_(store_rows(rows_FD, bits).values_FD())
    conversion = read_conversion(model)
    assert conversion is not None
    write_conversion(model, replace(conversion, weight_bits=bits))
    before = [ffn.weights().down_FD.clone() for ffn in expert_ffns(model)]
    refit(model, Refit(), text())
    for ffn, old_FD in zip(expert_ffns(model), before, strict=True):
        down_FD = ffn.weights().down_FD
        assert torch.allclose(store_rows(down_FD, bits).values_FD(), down_FD, atol=1e-6)
        assert not torch.equal(down_FD, old_FD)


def test_quantised_weights_are_refused() -> None:
    torch.manual_seed(0)
    model = build("llama")
    quantise_ffns(model)
    attach_experts(model, Conversion("donor", EXPERT_SIZE, "sigmoid", HALF))
    with pytest.raises(ValueError, match=r"layers.0.mlp: its CodedLinear is quantised, and cannot"):
        refit(model, Refit(), text())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_named_and_nothing_is_changed(value: float) -> None:
    model = Case().model()
    with torch.no_grad():
        expert_ffns(model)[1].weights().up_FD[0, 0] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp: refit finds no solution: its act"):
        refit(model, Refit(), text())
    assert model.state_dict().keys() == before.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


@pytest.mark.parametrize("ridge", [0.0, -0.1])
def test_a_ridge_has_to_pull(ridge: float) -> None:
    with pytest.raises(ValueError, match=f"refit: ridge is {ridge}, but must be above 0"):
        Refit(ridge).check()


def test_with_every_expert_on_it_computes_its_own_weights_and_the_bias() -> None:
    """No longer the donor: that is what the docstring of the step says."""
    model = Case().model()
    refit(model, Refit(), text())
    ffn = expert_ffns(model)[0]
    x_TD = torch.randn(5, 16)
    with every_expert_on(model):
        expected = ffn.projections.project_TD(ffn.hidden(x_TD)) + ffn.bias_D
        assert torch.equal(ffn(x_TD), expected)
