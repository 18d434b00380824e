"""Attach starts routers from what the donor does: checked against a second way to the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import read_conversion, write_conversion
from moe_tools.experts.division import Division
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import ROUTERS, RepresentativeRouter
from moe_tools.experts.routers.neurons import representatives_R
from moe_tools.experts.routers.ridge import RIDGE
from moe_tools.experts.routers.sigmoid import SPREAD
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import find_ffns
from moe_tools.recipe import Attach
from moe_tools.steps.attach import attach
from tests.families import (
    EXPERT_SIZE,
    EXPERTS,
    FAMILIES,
    SIZES,
    SPLIT,
    build,
    every_size,
    logits,
    of_size,
)

OPEN = Attach(start="open")
HALF = {"kind": "topk", "share": 0.5}


def halved(kind: str) -> Attach:
    """A router that runs half of the experts; SiLU has no exact zeros to predict."""
    options = {"zero_below": 0.05} if kind == "low_rank" else {}
    return Attach(kind, router_options=options, selector=HALF)


def text(rows: int = 16, length: int = 32) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def attached(
    donor: PreTrainedModel, step: Attach, blocks_BT: Tensor, size: int = EXPERT_SIZE
) -> PreTrainedModel:
    model = copy.deepcopy(donor)
    attach(model, step, of_size(size, SPLIT), blocks_BT)
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
def log_energies(h_TF: Tensor, down: nn.Module, size: int = EXPERT_SIZE) -> Tensor:
    energy_TF = (h_TF.double() * down.weight.double().norm(dim=0)) ** 2
    return torch.stack([part.sum(-1).log() for part in energy_TF.split(SIZES[size], -1)], -1)


@every_size
def test_the_start_is_a_ridge_regression_up_to_one_scale_and_one_shift(size: int) -> None:
    donor = build("llama")
    model = attached(donor, Attach(start_sparsity=0.1), text(), size)
    downs = [ffn.down for ffn in find_ffns(donor)]
    for (x_TD, h_TF), down, ffn in zip(seen(donor, text()), downs, expert_ffns(model), strict=True):
        expected = ridge(x_TD, log_energies(h_TF, down, size))
        got = nn.functional.linear(x_TD, ffn.router.weight, ffn.router.bias).detach().numpy()
        scale = got.std() / expected.std()
        shifted = (expected - expected.mean()) * scale + got.mean()
        assert np.abs(got - shifted).max() < 1e-3
        assert got.std() == pytest.approx(SPREAD, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_bottleneck_starts_as_the_nearest_map_of_its_rank(rank: int) -> None:
    """Eckart and Young on the ridge's centred predictions, by numpy's SVD of them all."""
    donor = build("llama")
    model = attached(donor, Attach("bottleneck", {"rank": rank}, start_sparsity=0.1), text())
    downs = [ffn.down for ffn in find_ffns(donor)]
    for (x_TD, h_TF), down, ffn in zip(seen(donor, text()), downs, expert_ffns(model), strict=True):
        full = ridge(x_TD, log_energies(h_TF, down))
        mean = full.mean(0)
        u, s, v = np.linalg.svd(full - mean, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ v[:rank] + mean
        got = ffn.router.logits_TR(x_TD).detach().numpy()
        scale = got.std() / expected.std()
        shifted = (expected - expected.mean()) * scale + got.mean()
        assert np.abs(got - shifted).max() < 2e-2 * got.std()
        assert got.std() == pytest.approx(SPREAD, rel=1e-2)
        middle_TK = ffn.router.enters_last_TK(x_TD).detach().numpy()
        spread = np.atleast_2d(np.cov(middle_TK.T, bias=True))
        assert np.abs(spread - np.eye(rank)).max() < 1e-2


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_bottleneck_starts_on_fewer_tokens_than_its_inputs(tokens: int) -> None:
    """As an expert of an MoE host may see: what they do not span is left alone."""
    model = attached(build("llama"), Attach("bottleneck", {"rank": 3}), text()[:1, :tokens])
    assert torch.isfinite(logits(model)).all()
    for ffn in expert_ffns(model):
        assert all(torch.isfinite(number).all() for number in ffn.router.parameters())


def test_a_bottleneck_as_wide_as_its_inputs_is_the_ridge() -> None:
    donor = build("llama")
    wide = attached(donor, Attach("bottleneck", {"rank": 99}), text())
    full = attached(donor, Attach("sigmoid"), text())
    for one, other, (x_TD, _) in zip(
        *map(expert_ffns, (wide, full)), seen(donor, text()), strict=True
    ):
        torch.testing.assert_close(one.router(x_TD), other.router(x_TD), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@every_size
def test_a_start_without_a_bias_regresses_what_sets_experts_apart(size: int, kind: str) -> None:
    """On the inputs as they are: no centring can stand for a constant that the router lacks."""
    donor, options = build("llama"), {"softmax": {}, "sigmoid": {"bias": False}}[kind]
    model = attached(donor, Attach(kind, {**options, "spread": 0.3}, HALF), text(), size)
    downs = [ffn.down for ffn in find_ffns(donor)]
    for (x_TD, h_TF), down, ffn in zip(seen(donor, text()), downs, expert_ffns(model), strict=True):
        x, y = x_TD.double().numpy(), log_energies(h_TF, down, size).numpy()
        y = y - y.mean(1, keepdims=True)
        penalty = RIDGE * (x**2).sum(0).mean()
        rows = np.vstack([x, np.sqrt(penalty) * np.eye(x.shape[1])])
        weight, *_ = np.linalg.lstsq(
            rows, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None
        )
        expected = x @ weight
        got = nn.functional.linear(x_TD, ffn.router.weight).detach().numpy()
        assert np.abs(got - expected * 0.3 / expected.std()).max() < 1e-3
        assert np.abs(got.mean(1)).max() < 1e-5


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


@pytest.mark.parametrize("step", [Attach(), OPEN, *map(halved, ROUTERS)], ids=str)
def test_what_an_expert_that_is_off_contributes_is_its_mean(step: Attach) -> None:
    donor = build("llama")
    model = attached(donor, replace(step, when_off="mean"), text())
    for (_, h_TF), ffn in zip(seen(donor, text()), expert_ffns(model), strict=True):
        assert ffn.off_F is not None
        assert (ffn.off_F - h_TF.mean(0)).abs().max() < 1e-6


def test_when_off_zero_keeps_no_mean() -> None:
    assert all(ffn.off_F is None for ffn in expert_ffns(attached(build("llama"), OPEN, text())))


@pytest.mark.parametrize("family", FAMILIES)
@every_size
def test_an_open_start_changes_no_logit(family: str, size: int) -> None:
    donor = build(family)
    model = attached(donor, OPEN, text(), size)
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
        (replace(OPEN, selector={"kind": "topk"}), "top-k needs either k or share"),
        (replace(OPEN, selector={"kind": "threshold", "k": 2}), "unexpected keyword argument 'k'"),
        (replace(OPEN, router_options={"hidden": 3}), "router sigmoid with .*'hidden'"),
        (replace(OPEN, router="norm", router_options={"hidden": 0}), "needs hidden >= 1, not 0"),
        (replace(OPEN, selector={"kind": "topk", "k": 7}), "top-k asks for 7 of 6 experts"),
    ],
)
def test_a_mistake_leaves_the_model_dense(step: Attach, message: str) -> None:
    model = build("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        attach(model, step, SPLIT, text())
    assert not expert_ffns(model)
    assert torch.equal(logits(model), before)
    assert read_conversion(model) is None


def test_a_size_beyond_the_neurons_leaves_the_model_dense() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="48 neurons: experts of 49 are not possible"):
        attach(model, Attach(), of_size(49, SPLIT), text())
    assert not expert_ffns(model)


def test_a_host_expert_without_a_token_leaves_the_model_dense() -> None:
    """One token reaches 2 of Mixtral's 4 experts."""
    model = build("mixtral")
    for step in (Attach(), Attach(start="open", when_off="mean")):
        with pytest.raises(ValueError, match=r"experts\.\d saw no calibration token: give more"):
            attach(model, step, SPLIT, text(rows=1, length=1))
        assert not expert_ffns(model)
    attach(model, OPEN, SPLIT, text(rows=1, length=1))  # needs no text


def test_a_routed_model_is_not_routed_again() -> None:
    model = attached(build("llama"), OPEN, text())
    with pytest.raises(ValueError, match="is routed already"):
        attach(model, OPEN, SPLIT, text())


# --- shared experts and routers that need no training


@every_size
def test_the_regression_leaves_shared_experts_out(size: int) -> None:
    """The routed experts start as they would without them, but for the common shift and scale."""
    donor = build("llama")
    split = replace(of_size(size, SPLIT), shared_experts=2)
    model = copy.deepcopy(donor)
    attach(model, Attach(start_sparsity=0.3), split, text())
    downs = [ffn.down for ffn in find_ffns(donor)]
    for (x_TD, h_TF), down, ffn in zip(seen(donor, text()), downs, expert_ffns(model), strict=True):
        expected = ridge(x_TD, log_energies(h_TF, down, size)[:, 2:])
        got = nn.functional.linear(x_TD, ffn.router.weight, ffn.router.bias).detach().numpy()
        shifted = (expected - expected.mean()) * (got.std() / expected.std()) + got.mean()
        assert np.abs(got - shifted).max() < 1e-3
        routing = ffn.route(x_TD)
        assert routing.mask_TE[:, :2].all()
        off = 1 - routing.mask_TE[:, 2:].double().mean()
        assert off == pytest.approx(0.3, abs=0.06)


def test_a_representative_is_the_neuron_nearest_to_its_experts_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the marks of all tokens: a wide sketch has their distances within 2 %."""
    monkeypatch.setattr("moe_tools.experts.profiles.SKETCH", 2**15)
    donor = build("llama")
    model = copy.deepcopy(donor)
    attach(model, Attach("representative", selector=HALF), replace(SPLIT, shared_experts=1), text())
    for (_, h_TF), ffn in zip(seen(donor, text()), expert_ffns(model), strict=True):
        marks_TF = torch.zeros_like(h_TF).scatter(1, h_TF.abs().topk(10).indices, 1.0)
        assert isinstance(ffn.router, RepresentativeRouter)
        assert len(ffn.router.neurons) == EXPERTS - 1
        for expert, neuron in enumerate(ffn.router.neurons.tolist(), start=1):
            marks_TN = marks_TF[:, expert * EXPERT_SIZE : (expert + 1) * EXPERT_SIZE]
            distance_N = (marks_TN - marks_TN.mean(1, keepdim=True)).norm(dim=0)
            assert distance_N[neuron - expert * EXPERT_SIZE] <= 1.02 * distance_N.min()
            assert distance_N.max() > 1.02 * distance_N.min()


def test_representatives_by_hand() -> None:
    rows_FX = torch.tensor([[0.0], [9.0], [1.0], [2.0], [6.0], [5.0], [7.0], [7.5]])
    importance = Importance(Division(8, 3), 1, torch.ones(8, 1))
    assert representatives_R(rows_FX, importance).tolist() == [5, 6]
    assert representatives_R(rows_FX, replace(importance, shared=0)).tolist() == [2, 5, 6]


STARTED = {"sigmoid", "bottleneck", "softmax", "representative", "few_bits"}


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - STARTED))
def test_the_others_need_no_text(kind: str) -> None:
    """Two tokens that the model does not have would be an IndexError."""
    model = attached(build("llama"), halved(kind), torch.tensor([[1000, 1000]]))
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["dynamic_k", "top_p"])
def test_shares_of_negative_scores_are_refused(kind: str) -> None:
    model = build("llama")
    selector = {
        "dynamic_k": {"kind": "dynamic_k", "tau": 0.5},
        "top_p": {"kind": "top_p", "p": 0.5},
    }
    step = Attach("similarity", selector=selector[kind])
    message = rf"^router similarity scores below 0, which selector {kind} cannot compare: use topk"
    write_conversion(model, SPLIT)
    with pytest.raises(ValueError, match=message):
        attach(model, step, SPLIT, text())
    with pytest.raises(ValueError, match=message):
        step.rehearse(model, "donor")
    assert not expert_ffns(model)


def test_the_config_says_what_is_shared_and_how_the_router_is_made() -> None:
    model = build("llama")
    step = Attach("norm", {"hidden": 5}, HALF, when_off="mean")
    attach(model, step, replace(SPLIT, shared_experts=2), text())
    conversion = read_conversion(model)
    assert conversion is not None
    assert (conversion.shared_experts, conversion.router_options) == (2, {"hidden": 5})
    assert (conversion.when_off, conversion.selector_of) == ("mean", {})


def test_a_rehearsal_reads_no_text() -> None:
    model = build("llama")
    write_conversion(model, SPLIT)
    Attach("representative", selector=HALF, when_off="mean").rehearse(model, "donor")
    assert len(expert_ffns(model)) == 2
