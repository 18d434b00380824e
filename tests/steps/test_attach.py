"""Attach starts routers from what the donor does: checked against a second way to the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.model.conversion import read_conversion
from moe_tools.model.experts import expert_ffns
from moe_tools.model.ffn import find_ffns
from moe_tools.model.routing import record_routing
from moe_tools.recipe import Attach
from moe_tools.steps.attach import RIDGE, SPREAD, attach
from tests.families import EXPERT_SIZE, EXPERTS, FAMILIES, build, logits

OPEN = Attach(start="open")


def text(rows: int = 16, length: int = 32) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def attached(donor: PreTrainedModel, step: Attach, blocks_BT: Tensor) -> PreTrainedModel:
    model = copy.deepcopy(donor)
    attach(model, step, "donor", EXPERT_SIZE, blocks_BT)
    return model


@torch.no_grad()
def seen(donor: PreTrainedModel, blocks_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(x_TD, h_TF) of every FFN, from the host's own modules in one batch."""
    pairs: list[list[Tensor]] = []
    for ffn in find_ffns(donor):
        pair: list[Tensor] = []
        pairs.append(pair)
        ffn.layer.register_forward_pre_hook(lambda _, args, pair=pair: pair.append(args[0]))
        ffn.down.register_forward_pre_hook(lambda _, args, pair=pair: pair.append(args[0]))
    donor(input_ids=blocks_BT)
    return [(x.flatten(0, -2), h.flatten(0, -2)) for x, h in pairs]


def ridge(x_TD: Tensor, target_TE: Tensor) -> np.ndarray:
    """Predictions of a ridge regression with a free intercept, by centering: no normal equations
    of ours. The penalty is the project's: RIDGE of the mean squared input, summed over tokens."""
    x, y = x_TD.double().numpy(), target_TE.double().numpy()
    penalty = RIDGE * (x**2).sum(0).mean()
    centred = x - x.mean(0)
    rows = np.vstack([centred, np.sqrt(penalty) * np.eye(x.shape[1])])
    wanted = np.vstack([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weight, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    return centred @ weight + y.mean(0)


@torch.no_grad()
def log_energies(h_TF: Tensor, down: nn.Module) -> Tensor:
    energy_TF = (h_TF.double() * down.weight.double().norm(dim=0)) ** 2
    return torch.stack([part.sum(-1).log() for part in energy_TF.split(EXPERT_SIZE, -1)], -1)


def test_the_start_is_a_ridge_regression_up_to_one_scale_and_one_shift() -> None:
    donor = build("llama")
    model = attached(donor, Attach(start_sparsity=0.1), text())
    downs = [ffn.down for ffn in find_ffns(donor)]
    for (x_TD, h_TF), down, ffn in zip(seen(donor, text()), downs, expert_ffns(model), strict=True):
        expected = ridge(x_TD, log_energies(h_TF, down))
        got = nn.functional.linear(x_TD, ffn.router.weight, ffn.router.bias).detach().numpy()
        scale = got.std() / expected.std()
        shifted = (expected - expected.mean()) * scale + got.mean()
        assert np.abs(got - shifted).max() < 1e-3
        assert got.std() == pytest.approx(SPREAD, rel=1e-3)


def test_the_start_predicts_better_than_each_expert_s_mean() -> None:
    donor = build("llama")
    model = attached(donor, Attach(), text())
    downs = [ffn.down for ffn in find_ffns(donor)]
    for (x_TD, h_TF), down, ffn in zip(seen(donor, text()), downs, expert_ffns(model), strict=True):
        target_TE = log_energies(h_TF, down)
        residual_TE = target_TE - target_TE.mean(0)
        predicted_TE = ffn.router(x_TD).detach().double().logit()
        correlation = torch.corrcoef(
            torch.stack([residual_TE.flatten(), (predicted_TE - predicted_TE.mean(0)).flatten()])
        )[0, 1]
        assert correlation > 0.3


@pytest.mark.parametrize("sparsity", [0.02, 0.2, 0.5])
def test_the_start_sparsity_is_about_met_in_every_ffn(sparsity: float) -> None:
    """About: the scores are taken for normal."""
    model = attached(build("llama"), Attach(start_sparsity=sparsity), text())
    with record_routing(model) as routings, torch.no_grad():
        model(input_ids=text())
    assert len(routings) == 2
    for routing in routings:
        off = 1 - routing.mask_TE.double().mean()
        assert off == pytest.approx(sparsity, abs=0.02 + 0.1 * sparsity)


@pytest.mark.parametrize("start", ["regression", "open"])
def test_what_an_expert_that_is_off_contributes_is_its_mean(start: Any) -> None:
    donor = build("llama")
    model = attached(donor, Attach(start=start, when_off="mean"), text())
    for (_, h_TF), ffn in zip(seen(donor, text()), expert_ffns(model), strict=True):
        assert ffn.off_F is not None
        assert (ffn.off_F - h_TF.mean(0)).abs().max() < 1e-6


def test_when_off_zero_keeps_no_mean() -> None:
    assert all(ffn.off_F is None for ffn in expert_ffns(attached(build("llama"), OPEN, text())))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_start_changes_no_logit(family: str) -> None:
    donor = build(family)
    model = attached(donor, OPEN, text())
    assert torch.equal(logits(model), logits(donor))
    with record_routing(model) as routings:
        logits(model)
    assert all(routing.mask_TE.all() for routing in routings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_by_regression(family: str) -> None:
    donor = build(family)
    model = attached(donor, Attach(start_sparsity=0.3), text(64))
    assert torch.isfinite(logits(model)).all()
    assert not torch.equal(logits(model), logits(donor))
    with record_routing(model) as routings:
        logits(model)
    off = sum(float((~r.mask_TE).sum()) for r in routings) / sum(
        r.mask_TE.numel() for r in routings
    )
    assert 0.05 < off < 0.6


def test_the_config_says_what_was_attached() -> None:
    model = attached(build("llama"), replace(OPEN, selector={"kind": "topk", "k": 2}), text())
    conversion = read_conversion(model)
    assert conversion is not None
    assert (conversion.router, conversion.mode, conversion.donor) == ("sigmoid", "hard", "donor")
    assert conversion.selector == {"kind": "topk", "k": 2}
    assert conversion.expert_size == EXPERT_SIZE


def test_batches_do_not_matter() -> None:
    """The sums are accumulated: two halves of the text are the whole."""
    donor = build("llama")
    whole = attached(donor, Attach(), text(8))
    again = attached(donor, Attach(), text(8)[[4, 5, 6, 7, 0, 1, 2, 3]])
    for one, other in zip(expert_ffns(whole), expert_ffns(again), strict=True):
        assert (one.router.weight - other.router.weight).abs().max() < 1e-3
        assert one.router.weight.shape == (EXPERTS, 16)


def test_a_bf16_donor_gets_fp32_routers() -> None:
    model = attached(build("llama").bfloat16(), Attach(when_off="mean"), text())
    for ffn in expert_ffns(model):
        assert {p.dtype for p in ffn.router.parameters()} == {torch.float32}
        assert ffn.down.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (replace(OPEN, router="sigmod"), "unknown router 'sigmod'; did you mean 'sigmoid'"),
        (replace(OPEN, selector={"kind": "tresh"}), "unknown selector 'tresh'; did you mean 'thr"),
        (replace(OPEN, selector={"tau": 0.5}), "unknown selector ''"),
        (replace(OPEN, selector={"kind": "topk"}), "missing 1 required positional argument: 'k'"),
        (replace(OPEN, selector={"kind": "threshold", "k": 2}), "unexpected keyword argument 'k'"),
    ],
)
def test_a_mistake_leaves_the_model_dense(step: Attach, message: str) -> None:
    model = build("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        attach(model, step, "donor", EXPERT_SIZE, text())
    assert not expert_ffns(model)
    assert torch.equal(logits(model), before)
    assert read_conversion(model) is None


def test_a_size_that_does_not_divide_leaves_the_model_dense() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="48 neurons, which experts of 10 do not divide"):
        attach(model, Attach(), "donor", 10, text())
    assert not expert_ffns(model)


def test_a_host_expert_without_a_token_leaves_the_model_dense() -> None:
    """One token reaches 2 of Mixtral's 4 experts."""
    model = build("mixtral")
    for step in (Attach(), Attach(start="open", when_off="mean")):
        with pytest.raises(ValueError, match=r"experts\.\d saw no calibration token: give more"):
            attach(model, step, "donor", EXPERT_SIZE, text(rows=1, length=1))
        assert not expert_ffns(model)
    attach(model, OPEN, "donor", EXPERT_SIZE, text(rows=1, length=1))  # needs no text


def test_a_routed_model_is_not_routed_again() -> None:
    model = attached(build("llama"), OPEN, text())
    with pytest.raises(ValueError, match="is routed already"):
        attach(model, OPEN, "donor", EXPERT_SIZE, text())
