"""Fit trains routers on cached activations: what it learns, what it measures, how it resumes."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.routers import ROUTERS, LearnedRouter
from moe_tools.recipe import Fit
from moe_tools.steps.activation_cache import ActivationCache
from moe_tools.steps.fit import DENSITIES, fit, judge
from tests.families import UNEVEN, build, logits
from tests.killed import Killed

fit_module = importlib.import_module(fit.__module__)
cache_module = importlib.import_module(ActivationCache.__module__)
LEARNED = sorted(name for name, kind in ROUTERS.items() if issubclass(kind, LearnedRouter))
OTHERS = sorted(set(ROUTERS) - set(LEARNED))
OPTIONS = {"low_rank": {"zero_below": 0.5}}
"""SiLU makes no exact zeros."""
QUICK = Fit(epochs=3, lr=1e-2, batch_size=128)
UNTRAINED = Fit(epochs=1, lr=0.0, batch_size=128)
every_learned = pytest.mark.parametrize("kind", LEARNED)
property_test = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def text(rows: int = 48, length: int = 32) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(6))


def attached(
    kind: str, family: str = "llama", shared: int = 1, when_off: Any = "zero"
) -> PreTrainedModel:
    """Uneven experts and fresh routers; the same on every call."""
    torch.manual_seed(0)
    model = build(family)
    selector = {"kind": "topk", "share": 0.5}
    options = OPTIONS.get(kind, {})
    conversion = Conversion("donor", UNEVEN, kind, selector, "hard", when_off, shared, options)
    for ffn in attach_experts(model, conversion):
        if ffn.off_F is not None:
            ffn.off_F.normal_(std=0.1)
    return model


def routers(model: PreTrainedModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".router." in key}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def fitted(
    model: PreTrainedModel, work: Path, step: Fit = QUICK, blocks_BT: Tensor | None = None
) -> dict[str, Any]:
    return fit(model, step, text() if blocks_BT is None else blocks_BT, work)["routers"]


# --- what it learns


@every_learned
@pytest.mark.parametrize("when_off", ["zero", "mean"])
def test_a_fit_beats_what_it_started_from(kind: str, when_off: str, tmp_path: Path) -> None:
    fresh = fitted(attached(kind, when_off=when_off), tmp_path / "fresh", UNTRAINED)
    found = fitted(attached(kind, when_off=when_off), tmp_path / "fit")
    assert found.keys() == fresh.keys() and len(found) == 2
    for name, after in found.items():
        before = fresh[name]
        assert after["loss"] < 0.98 * before["loss"]
        for density in DENSITIES:
            if kind == "norm" or when_off == "zero":  # magnitudes are no norms
                assert after[f"captured_{density}"] > before[f"captured_{density}"]
            assert after[f"captured_{density}"] <= after[f"best_{density}"] + 1e-6
            assert after[f"best_{density}"] == before[f"best_{density}"]


@pytest.mark.parametrize("family", ["phi3", "opt", "t5-gated", "mixtral"])
@every_learned
def test_a_fit_changes_routers_and_nothing_else(kind: str, family: str, tmp_path: Path) -> None:
    model = attached(kind, family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = fitted(model, tmp_path, Fit(epochs=1, batch_size=256))
    assert list(found) == [ffn.name for ffn in expert_ffns(model)]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (".router." in key), key
    assert not model.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", OTHERS)
def test_a_router_that_needs_no_training_is_measured_only(kind: str, tmp_path: Path) -> None:
    model = attached(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    found = fitted(model, tmp_path)
    assert same({key: value.clone() for key, value in model.state_dict().items()}, before)
    assert torch.equal(logits(model), expected)
    for ffn in expert_ffns(model):
        report = found[ffn.name]
        assert report["loss"] is None
        dense_flops = 2 * sum(matrix.numel() for matrix in ffn.weights().matrices())
        assert report["router_share"] == pytest.approx(ffn.router.flops() / dense_flops)


def test_the_oracle_finds_every_expert_but_for_ties(tmp_path: Path) -> None:
    """Both are computed from inputs that were kept in bf16."""
    oracle = fitted(attached("oracle"), tmp_path / "oracle")
    learned = fitted(attached("norm"), tmp_path / "norm")
    for name, report in oracle.items():
        for density in DENSITIES:
            assert report[f"recall_{density}"] > 0.99
            best = report[f"best_{density}"]
            assert report[f"captured_{density}"] == pytest.approx(best, abs=1e-3)
            assert learned[name][f"captured_{density}"] < best


@every_learned
@torch.no_grad()
def test_the_epoch_of_the_least_held_out_loss_is_kept(kind: str, tmp_path: Path) -> None:
    """On little text the later epochs learn it by heart."""
    model = attached(kind)
    with torch.enable_grad():
        found = fitted(model, tmp_path, Fit(epochs=30, lr=0.3, batch_size=32), text(4))
    cache = ActivationCache(tmp_path / "activations")
    for index, ffn in enumerate(expert_ffns(model)):
        dtype = ffn.router.target_dtype
        x_TD, target_TR = cache.read(index, "x", 16), cache.read(index, "target", 4, dtype)
        held = ffn.router.loss(x_TD[-13:], target_TR[-13:].float()).item()
        assert found[ffn.name]["loss"] == pytest.approx(held, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = attached("norm")
    with pytest.raises(FloatingPointError, match="lower the learning rate of `fit`"):
        fitted(model, tmp_path, Fit(epochs=1, lr=1e30, batch_size=128))


def test_the_seed_is_that_of_the_order(tmp_path: Path) -> None:
    found = []
    for index, seed in enumerate((0, 0, 1)):
        model = attached("norm")
        fit(model, Fit(epochs=1, batch_size=128), text(8), tmp_path / str(index), seed=seed)
        found.append(routers(model))
    # the random start is that of `attached`
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


# --- what it refuses


def test_a_dense_model_has_no_router_to_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^fit needs routers: put `attach` before it in the rec"):
        fit(build("llama"), QUICK, text(), tmp_path)


def test_one_token_cannot_be_held_out_and_learned_from(tmp_path: Path) -> None:
    message = r"^model\.layers\.0\.mlp saw 1 calibration tokens: give more$"
    with pytest.raises(ValueError, match=message):
        fitted(attached("mlp"), tmp_path, blocks_BT=text(1, 1))


def test_a_host_expert_without_a_token_is_named(tmp_path: Path) -> None:
    """One token reaches 2 of Mixtral's 4 experts."""
    with pytest.raises(ValueError, match=r"experts\.\d saw no calibration token: give more"):
        fitted(attached("mlp", "mixtral"), tmp_path, blocks_BT=text(1, 1))


# --- killed


def die_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> list[int]:
    """The module dies in the call of this number; the list grows with every call."""
    real, calls = getattr(module, name), []

    def die(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, die)
    return calls


DEATHS = {
    "in the first router": ("_fit_one", 0),
    "in the second router": ("_fit_one", 1),
    "before the second router is kept": ("save_file", 1),
}


@every_learned
@pytest.mark.parametrize("place", DEATHS)
def test_a_fit_that_died_goes_on(
    kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Fit(epochs=2, batch_size=256)
    whole = attached(kind)
    expected = fitted(whole, tmp_path / "whole", step)
    name, call = DEATHS[place]
    die_at(monkeypatch, fit_module, name, call)
    with pytest.raises(Killed):
        fitted(attached(kind), tmp_path / "work", step)
    monkeypatch.undo()
    passes = die_at(monkeypatch, cache_module, "visit_activations", 0)
    fits = die_at(monkeypatch, fit_module, "_fit_one", 99)
    again = attached(kind)
    assert fitted(again, tmp_path / "work", step) == expected
    assert same(routers(again), routers(whole))
    assert not passes  # the activations are on disk
    assert len(fits) == (2 if place == "in the first router" else 1)


def test_a_complete_fit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("mlp")
    expected = fitted(model, tmp_path)
    die_at(monkeypatch, fit_module, "_fit_one", 0)
    again = attached("mlp")
    assert fitted(again, tmp_path) == expected
    assert same(routers(again), routers(model))


@pytest.mark.parametrize("left", ["in the middle", "before the end"])
def test_a_cache_is_complete_or_made_again(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = attached("mlp")
    expected = fitted(whole, tmp_path / "whole")
    activations = tmp_path / "work" / "activations"
    if left == "in the middle":
        die_at(monkeypatch, cache_module, "append_raw", 7)
        with pytest.raises(Killed):
            fitted(attached("mlp"), tmp_path / "work")
        monkeypatch.undo()
        assert list(activations.iterdir())
    else:
        shutil.copytree(tmp_path / "whole" / "activations", activations)
        (activations / "complete.json").unlink()
    again = attached("mlp")
    assert fitted(again, tmp_path / "work") == expected
    assert same(routers(again), routers(whole))
    for file in (tmp_path / "whole" / "activations").iterdir():
        assert (tmp_path / "work" / "activations" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool], ids=str)
@torch.no_grad()
def test_the_cache_has_every_token_in_order(dtype: torch.dtype, tmp_path: Path) -> None:
    def target(ffn: ExpertFFN, h_TF: Tensor) -> Tensor:
        norm_TR = ffn.importance().norm_TR(h_TF)
        return norm_TR > 0.2 if dtype == torch.bool else norm_TR.to(dtype)

    model = attached("mlp")
    ffns = expert_ffns(model)
    inputs: list[Tensor] = []
    for ffn in ffns:
        ffn.projections.up.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for ffn in ffns:  # the donor, every expert on
        ffn.selector = type("All", (), {"__call__": lambda _, s_TR: torch.ones_like(s_TR).bool()})()
    model(input_ids=text(10))
    expected = [x_TD.flatten(0, -2) for x_TD in inputs]
    for ffn in ffns:
        ffn.projections.up._forward_pre_hooks.clear()
    cache = ActivationCache(tmp_path)
    cache.fill(model, ffns, text(10), target)
    for index, (ffn, x_TD) in enumerate(zip(ffns, expected, strict=True)):
        target_TR = target(ffn, ffn.hidden(x_TD))
        kept_TD = cache.read(index, "x", x_TD.shape[1])
        kept_TR = cache.read(index, "target", target_TR.shape[1], dtype)
        assert (kept_TD.dtype, kept_TD.shape) == (torch.bfloat16, x_TD.shape)
        assert (kept_TR.dtype, kept_TR.shape) == (dtype, target_TR.shape)
        torch.testing.assert_close(kept_TD.float(), x_TD, rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(kept_TR.float(), target_TR.float(), rtol=1e-2, atol=1e-5)


def test_without_a_target_only_inputs_are_kept(tmp_path: Path) -> None:
    model = attached("similarity")
    ActivationCache(tmp_path).fill(model, expert_ffns(model), text(10), lambda ffn, h_TF: None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0.x", "1.x", "complete.json"]


# --- what it measures


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
@property_test
def test_routers_are_judged_token_by_token(tokens: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    scores_TR, target_TR = torch.rand(tokens, experts), torch.rand(tokens, experts)
    found = judge(scores_TR, target_TR)
    for density in DENSITIES:
        k = max(1, round(density * experts))
        recall = captured = best = 0.0
        for scores, target in zip(scores_TR.tolist(), target_TR.tolist(), strict=True):
            chosen = sorted(range(experts), key=lambda e: -scores[e])[:k]
            true = sorted(range(experts), key=lambda e: -target[e])[:k]
            recall += len(set(chosen) & set(true)) / k / tokens
            captured += sum(target[e] for e in chosen) / float(target_TR.sum())
            best += sum(target[e] for e in true) / float(target_TR.sum())
        assert found[f"recall_{density}"] == pytest.approx(recall, rel=1e-4)
        assert found[f"captured_{density}"] == pytest.approx(captured, rel=1e-4)
        assert found[f"best_{density}"] == pytest.approx(best, rel=1e-4)


def test_targets_judge_themselves_as_perfect() -> None:
    target_TR = torch.rand(50, 8)
    found = judge(5 * target_TR, target_TR)
    for density in DENSITIES:
        assert found[f"recall_{density}"] == 1
        assert found[f"captured_{density}"] == found[f"best_{density}"]
    assert judge(target_TR, torch.zeros(50, 8))["captured_0.5"] == 0
