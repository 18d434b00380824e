"""The learned neuron predictor: labels and scores by hand, what it refuses, what it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.division import Division
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import LowRankRouter
from moe_tools.recipe import Fit
from moe_tools.steps.fit import fit
from tests.families import NEURONS, build, logits

TAU = {"kind": "threshold", "tau": 0.5}


def importance(shared: int = 0, off: float | None = None, experts: int = 4) -> Importance:
    off_F = None if off is None else torch.full((4,), off)
    return Importance(Division(4, experts), shared, torch.ones(4, 3), off_F)


def predictors(family: str, **options: Any) -> PreTrainedModel:
    """Every neuron an expert."""
    model = build(family)
    attach_experts(model, Conversion("donor", 1, "low_rank", TAU, router_options=options))
    return model


@pytest.mark.parametrize(
    ("zero_below", "label"),
    [
        (0.0, [True, False, True, True]),
        (0.2, [True, False, False, True]),
        (0.25, [False, False, False, True]),
    ],
)
def test_a_label_says_whether_a_neuron_is_non_zero(zero_below: float, label: list[bool]) -> None:
    """The share is of the token's own largest, and a neuron has to be above it."""
    h_TF = torch.tensor([[-2.0, 0.0, 1e-20, 8.0], [0.0, 0.0, 0.0, 0.0]])
    router = LowRankRouter(3, 4, zero_below=zero_below)
    target_TR = router.target_TR(h_TF, importance())
    assert target_TR.dtype == router.target_dtype == torch.bool
    assert target_TR.tolist() == [label, [False] * 4]
    assert router.target_TR(h_TF, importance(shared=1)).tolist() == [label[1:], [False] * 3]
    assert torch.equal(router.label_TR(target_TR), target_TR.float())


def test_an_expert_of_several_neurons_is_non_zero_when_one_is() -> None:
    h_TF = torch.tensor([[0.0, 0.5, 0.0, 0.0]])
    target_TR = LowRankRouter(3, 2).target_TR(h_TF, importance(experts=2))
    assert target_TR.tolist() == [[True, False]]


def test_zero_is_what_a_neuron_is_when_off() -> None:
    h_TF = torch.tensor([[0.5, 0.0, 0.5, 1.0]])
    target_TR = LowRankRouter(3, 4).target_TR(h_TF, importance(off=0.5))
    assert target_TR.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_scores_by_hand(bias: bool) -> None:
    router, x_TD = LowRankRouter(5, 7, rank=3, bias=bias), torch.randn(4, 5)
    hidden = (x_TD @ router.first.weight.T).clamp_min(0)
    logits_TR = hidden @ router.second.weight.T + (router.second.bias if bias else 0)
    torch.testing.assert_close(router(x_TD), 1 / (1 + (-logits_TR).exp()), rtol=1e-5, atol=1e-6)
    assert router.first.weight.shape == (3, 5) and router.first.bias is None
    assert (router.second.bias is not None) == bias
    assert router.flops() == 2 * (5 * 3 + 3 * 7)


@torch.no_grad()
def test_a_positive_counts_for_its_weight() -> None:
    router, x_TD = LowRankRouter(5, 7, rank=3, positive_weight=4.0), torch.randn(6, 5)
    target_TR = torch.rand(6, 7) < 0.3
    score_TR = router(x_TD)
    expected_TR = torch.where(target_TR, -4 * score_TR.log(), -(1 - score_TR).log())
    torch.testing.assert_close(router.loss(x_TD, target_TR), expected_TR.mean())


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_it_starts_at_the_constants_of_least_loss(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_tools.experts.routers.low_rank.ROWS", 3)
    router = LowRankRouter(5, 3, positive_weight=weight)
    target_TR = torch.tensor([[True, False, False]] * 6 + [[True, False, True]] * 2)
    router.prepare(target_TR)
    odds = [8.5 / 0.5, 0.5 / 8.5, 2.5 / 6.5]
    expected = [math.log(weight * one) for one in odds]
    assert router.second.bias.tolist() == pytest.approx(expected, rel=1e-5)
    weights = router.second.weight.clone()
    without = LowRankRouter(5, 3, bias=False)
    before = without.second.weight.clone()
    without.prepare(target_TR)
    assert torch.equal(without.second.weight, before)
    assert torch.equal(router.second.weight, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"^a low-rank router needs rank >= 1, not 0$"),
        ({"zero_below": 1.0}, r"^a low-rank router needs zero_below in \[0, 1\), not 1.0$"),
        ({"zero_below": -0.1}, r"needs zero_below in \[0, 1\), not -0.1$"),
        ({"positive_weight": 0}, r"^a low-rank router needs a positive_weight above 0, not 0$"),
        ({"positive_weight": float("nan")}, r"positive_weight above 0, not nan$"),
        ({"rank": "many"}, r"^a low-rank router needs rank >= 1, not 'many'$"),
        ({"depth": 2}, r"^router low_rank with {'depth': 2}: .*'depth'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictors("opt", **options)


def text() -> torch.Tensor:
    return torch.randint(3, 64, (48, 32), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("family", ["opt", "t5-relu"])
def test_training_finds_what_chance_does_not(family: str, tmp_path: Path) -> None:
    """At the same share of neurons on, chance would have a recall of that share."""
    model = predictors(family, rank=8)
    found = fit(model, Fit(epochs=8, lr=1e-2, batch_size=64), text(), tmp_path)
    assert len(found["routers"]) == len(expert_ffns(model))
    for one in [*(r["prediction"] for r in found["routers"].values()), found["prediction"]]:
        truth = one["nonzero"] / one["seen"]
        assert one["recall"] > 1 - one["sparsity"] + 0.15
        assert one["precision"] > truth + 0.15
        assert one["recall"] == one["hits"] / one["nonzero"]


def test_a_higher_weight_misses_less(tmp_path: Path) -> None:
    recalls = []
    for weight in (0.3, 1.0, 5.0):
        torch.manual_seed(0)
        model = predictors("opt", rank=4, positive_weight=weight)
        step = Fit(epochs=5, lr=1e-2, batch_size=64)
        recalls.append(fit(model, step, text(), tmp_path / str(weight))["prediction"]["recall"])
    assert recalls[0] + 0.05 < recalls[1] < recalls[2] - 0.05


def test_every_expert_of_an_moe_host_has_its_own(tmp_path: Path) -> None:
    model = predictors("mixtral", rank=4, zero_below=0.3)
    ffns = expert_ffns(model)
    assert len(ffns) == 2 * 4  # layers, experts
    found = fit(model, Fit(epochs=2, lr=1e-2, batch_size=64), text(), tmp_path)
    assert list(found["routers"]) == [ffn.name for ffn in ffns]
    weights = [ffn.router.get_parameter("first.weight") for ffn in ffns]
    assert len({weight.data_ptr() for weight in weights}) == len(ffns)
    seen = [found["routers"][ffn.name]["prediction"]["seen"] for ffn in ffns]
    assert sum(seen) == found["prediction"]["seen"]
    # each token goes to 2 of 4 experts; a tenth of each expert's tokens only measures
    assert sum(seen) == pytest.approx(0.1 * text().numel() * 2 * 2 * NEURONS, rel=0.01)


def test_a_folder_gives_predictors_back(tmp_path: Path) -> None:
    model = predictors("opt", rank=3, zero_below=0.1, positive_weight=2.0, bias=False)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    for one, other in zip(expert_ffns(model), expert_ffns(loaded), strict=True):
        assert other.division.of_neurons and other.router.zero_below == 0.1
        assert isinstance(other.router, LowRankRouter) and other.router.positive_weight == 2.0
        assert other.router.state_dict().keys() == {"first.weight", "second.weight"}
        for name, tensor in one.router.state_dict().items():
            assert torch.equal(other.router.state_dict()[name], tensor)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=2e-6)
