"""Budget: the stated share of neurons is off, and is spent where it costs least."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.experts.selectors import Threshold, tune_selector
from moe_tools.recipe import Budget
from moe_tools.steps.budget import budget
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.spending import CURVE_POINTS, Point, error_curves, spend_by_error
from tests.families import EXPERT_SIZE, NEURONS, UNEVEN, build, per_neuron

budget_module = importlib.import_module(budget.__module__)
SELECTORS: dict[str, dict[str, Any]] = {
    "threshold": {"kind": "threshold", "tau": 0.5},
    "dynamic_k": {"kind": "dynamic_k", "tau": 0.5},
    "top_p": {"kind": "top_p", "p": 0.5},
    "topk": {"kind": "topk", "k": 2},
}
every_selector = pytest.mark.parametrize("kind", SELECTORS)
every_spend = pytest.mark.parametrize("spend", ["uniform", "error"])
property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def text(rows: int = 8, length: int = 32) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(7))


def attached(
    kind: str = "threshold",
    router: str = "oracle",
    size: int = EXPERT_SIZE,
    shared: int = 0,
    family: str = "llama",
    when_off: Any = "zero",
) -> PreTrainedModel:
    model = build(family)
    conversion = Conversion("donor", size, router, SELECTORS[kind], "hard", when_off, shared)
    for ffn in attach_experts(model, conversion):
        if ffn.off_F is not None:
            ffn.off_F.normal_(std=0.1)
    return model


@torch.no_grad()
def masks(model: PreTrainedModel, blocks_BT: Tensor) -> list[Tensor]:
    with record_routing(model) as routings:
        model(input_ids=blocks_BT)
    return [routing.mask_TE for routing in routings]


def sparsity(model: PreTrainedModel, size: int = EXPERT_SIZE) -> float:
    """Neurons off, counted one by one."""
    on = [per_neuron(mask_TE, size).flatten() for mask_TE in masks(model, text())]
    return 1 - torch.cat(on).double().mean().item()


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
@pytest.mark.parametrize(("size", "shared"), [(EXPERT_SIZE, 0), (UNEVEN, 0), (UNEVEN, 1)])
@every_spend
def test_a_threshold_reaches_the_target(target: float, size: int, shared: int, spend: Any) -> None:
    model = attached(size=size, shared=shared)
    found = budget(model, Budget(target, spend), text())
    assert found["sparsity"] == pytest.approx(sparsity(model, size), abs=1e-9)
    assert found["sparsity"] == pytest.approx(target, abs=0.02)


@every_selector
@every_spend
@pytest.mark.parametrize("router", ["mlp", "representative", "oracle"])
def test_every_selector_comes_near(kind: str, spend: Any, router: str) -> None:
    """Top-k counts whole experts a token, and others keep the best: an FFN's share is not met."""
    model = attached(kind, router)
    near = pytest.approx(0.5, abs=0.05 if spend == "uniform" or kind == "threshold" else 0.1)
    assert budget(model, Budget(0.5, spend), text())["sparsity"] == near
    if kind == "topk" and spend == "uniform":
        assert all((mask_TE.sum(-1) == 3).all() for mask_TE in masks(model, text()))


def test_many_scores_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 x 4 x 32 tokens a third, of every batch, at every round."""
    seen = []

    def tune(selector: Any, scores_TR: Tensor, density: float) -> Any:
        seen.append(tuple(scores_TR.shape))
        return tune_selector(selector, scores_TR, density)

    monkeypatch.setattr("moe_tools.experts.selectors.SAMPLE", 256 * NEURONS // 3)
    monkeypatch.setattr(budget_module, "tune_selector", tune)
    model = attached(router="norm", size=1)
    found = budget(model, Budget(0.6), text())
    assert set(seen) == {(2 * 43, NEURONS)}
    assert found["sparsity"] == pytest.approx(0.6, abs=0.03)
    on = torch.cat([mask_TE.flatten() for mask_TE in masks(model, text())])
    assert found["sparsity"] == pytest.approx(1 - on.double().mean().item(), abs=1e-9)


def test_uniform_gives_every_ffn_the_same() -> None:
    model = attached(size=UNEVEN, shared=1)
    found = budget(model, Budget(0.5), text())
    assert list(found["given"]) == [ffn.name for ffn in expert_ffns(model)]
    for off in found["given"].values():
        assert off == pytest.approx(0.5 * 48 / 38)
    for mask_TE in masks(model, text()):
        assert 1 - per_neuron(mask_TE, UNEVEN).double().mean() == pytest.approx(0.5, abs=0.02)


def cheap_first(model: PreTrainedModel) -> None:
    """In the first FFN, few experts do anything; in the second, all do the same."""
    first, second = expert_ffns(model)
    with torch.no_grad():
        first.weights().down_FD[EXPERT_SIZE:] *= 0.01
        second.weights().down_FD.copy_(second.weights().down_FD[:1].expand(NEURONS, -1))


@pytest.mark.parametrize("when_off", ["zero", "mean"])
def test_spending_by_error_costs_no_more_than_the_same_for_all(when_off: str) -> None:
    torch.manual_seed(1)
    model = attached(when_off=when_off)
    cheap_first(model)
    first, second = (ffn.name for ffn in expert_ffns(model))
    with torch.no_grad():
        curves = error_curves(model, expert_ffns(model), text())
    given = budget(model, Budget(0.4, "error"), text())["given"]
    assert given[first] > given[second]
    assert (given[first] + given[second]) / 2 == pytest.approx(0.4)
    assert cost(curves, given) < cost(curves, dict.fromkeys(given, 0.4))


def cost(curves: dict[str, list[Point]], given: dict[str, float]) -> float:
    """Sum of the errors, straight between the points."""
    return sum(
        float(np.interp(given[name], *zip(*found, strict=True))) for name, found in curves.items()
    )


@torch.no_grad()
@pytest.mark.parametrize("when_off", ["zero", "mean"])
def test_errors_go_from_nothing_to_all_that_can_be_off(when_off: str) -> None:
    model = attached(shared=2, when_off=when_off)
    inputs: list[Tensor] = []
    for ffn in expert_ffns(model):
        ffn.projections.up.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        ffn.selector = replace(ffn.selector, tau=-1.0)
    model(input_ids=text(1))
    seen = inputs[1::2]  # the oracle runs the FFN before the FFN does
    for ffn in expert_ffns(model):
        ffn.projections.up._forward_pre_hooks.clear()
    curves = error_curves(model, expert_ffns(model), text(1))
    assert list(curves) == [ffn.name for ffn in expert_ffns(model)]
    for ffn, x_TD in zip(expert_ffns(model), seen, strict=True):
        found = [point.error for point in curves[ffn.name]]
        assert len(found) == CURVE_POINTS + 1 and curves[ffn.name][0] == (0, 0)
        assert found == pytest.approx(sorted(found), rel=0.2)
        assert curves[ffn.name][-1].saved == 1
        bias = ffn.weights().down_D
        dense_TD = ffn(x_TD) - bias
        ffn.selector = replace(ffn.selector, tau=1e9)
        lost = (ffn(x_TD) - bias - dense_TD).square().sum() / dense_TD.square().sum()
        assert found[-1] == pytest.approx(lost.item(), rel=1e-4)


@torch.no_grad()
def test_errors_count_the_constants_of_what_is_off() -> None:
    """They make up for all of it, and nothing is lost: a token is as good as its mean."""
    model, block_BT = attached(), text(1, 2)[:, :1].expand(8, 8)
    curves = error_curves(model, expert_ffns(model), block_BT)
    seen: list[Tensor] = []
    visit_activations(model, block_BT, lambda _, __, h_TF: seen.append(h_TF[0]))
    for ffn, h_F in zip(expert_ffns(model), seen[: len(expert_ffns(model))], strict=True):
        ffn.add_constants()
        pieces = zip(
            h_F.split(ffn.division.sizes),
            ffn.weights().down_FD.split(ffn.division.sizes),
            strict=True,
        )
        ffn.off_RD.copy_(torch.stack([h_N @ down_ND for h_N, down_ND in pieces]))
    constant = error_curves(model, expert_ffns(model), block_BT)
    for name, points in curves.items():
        assert points[-1].error > 0.5
        assert max(point.error for point in constant[name]) < 1e-9


def test_more_than_what_is_routed_cannot_be_off() -> None:
    model = attached(shared=3)
    selectors = [ffn.selector for ffn in expert_ffns(model)]
    message = (
        r"^model\.layers\.0\.mlp: 60% of the neurons cannot be off, 50% are in shared experts$"
    )
    with pytest.raises(ValueError, match=message):
        budget(model, Budget(0.6), text())
    assert [ffn.selector for ffn in expert_ffns(model)] == selectors
    assert budget(model, Budget(0.49), text())["sparsity"] == pytest.approx(0.49, abs=0.02)


def test_a_dense_model_has_no_budget() -> None:
    with pytest.raises(ValueError, match=r"^budget needs routers: put `attach` before it"):
        budget(build("llama"), Budget(0.5), text())


def test_a_host_expert_without_a_token_is_named() -> None:
    model = attached(family="mixtral")
    with pytest.raises(ValueError, match=r"experts\.\d saw no calibration token: give more"):
        budget(model, Budget(0.5), text(1, 1))


@every_spend
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_experts_of_an_moe_host_count_by_their_tokens(spend: Any, target: float) -> None:
    model = attached(family="mixtral")
    found = budget(model, Budget(target, spend), text())
    on = [mask_TE.double().mean(-1) for mask_TE in masks(model, text())]
    assert found["sparsity"] == pytest.approx(1 - torch.cat(on).mean().item(), abs=1e-3)
    assert found["sparsity"] == pytest.approx(target, abs=0.03)


@every_selector
@every_spend
def test_a_folder_has_the_same_masks(kind: str, spend: Any, tmp_path: Path) -> None:
    model = attached(kind, size=UNEVEN, shared=1)
    budget(model, Budget(0.4, spend), text())
    conversion = read_conversion(model)
    assert conversion is not None
    assert list(conversion.selector_of) == [ffn.name for ffn in expert_ffns(model)]
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    for one, other in zip(expert_ffns(model), expert_ffns(loaded), strict=True):
        assert other.selector == one.selector
    for one_TE, other_TE in zip(masks(model, text()), masks(loaded, text()), strict=True):
        assert (one_TE != other_TE).double().mean() < 1e-3  # a score may round across the line


def test_it_leaves_the_weights_and_nothing_behind() -> None:
    model = attached()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    budget(model, Budget(0.5, "error"), text())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(ffn.observers for ffn in expert_ffns(model))
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- spend_by_error


def curve(*errors: float) -> list[Point]:
    """Errors at equal steps from nothing to everything saved."""
    return [Point(at / (len(errors) - 1), error) for at, error in enumerate(errors)]


@st.composite
def bills(
    draw: st.DrawFn, convex: bool = False
) -> tuple[dict[str, list[Point]], dict[str, float], float]:
    """Curves of a few FFNs at equal steps, their work, and what to save of it."""
    names = "abcd"[: draw(st.integers(1, 4))]
    steps = draw(st.integers(1, 5))
    curves, work = {}, {}
    for name in names:
        rises = draw(st.lists(st.integers(0, 50), min_size=steps, max_size=steps))
        rises = sorted(rises) if convex else rises
        curves[name] = curve(0.0, *(float(total) for total in itertools.accumulate(rises)))
        work[name] = float(draw(st.integers(1, 30)))
    return curves, work, draw(st.integers(0, 20)) / 20 * sum(work.values())


@given(bills())
@property_test
def test_what_is_spent_adds_up(bill: tuple[Any, ...]) -> None:
    curves, work, saved = bill
    spent = spend_by_error(curves, work, saved)
    assert spent.keys() == curves.keys()
    assert all(0 <= share <= 1 for share in spent.values())
    assert math.fsum(spent[name] * work[name] for name in spent) == pytest.approx(saved, abs=1e-6)


@given(bills(convex=True))
@property_test
def test_nothing_costs_less_where_errors_are_convex(bill: tuple[Any, ...]) -> None:
    """Against a linear program: each step of each FFN is taken in part, all add up to `saved`."""
    curves, work, saved = bill
    steps = {name: np.diff([p.error for p in found]) for name, found in curves.items()}
    prices = np.concatenate(list(steps.values()))
    sizes = np.concatenate([np.full(len(s), work[name] / len(s)) for name, s in steps.items()])
    least = linprog(prices, A_eq=sizes[None], b_eq=[saved], bounds=(0, 1)).fun
    spent = spend_by_error(curves, work, saved)
    assert cost(curves, spent) == pytest.approx(least, rel=1e-5, abs=1e-5)


@given(bills(convex=True))
@property_test
def test_the_cheaper_ffn_gets_more(bill: tuple[Any, ...]) -> None:
    curves, work, saved = bill
    dear = {
        f"dear {name}": [Point(p.saved, 10 * p.error + p.saved) for p in found]
        for name, found in curves.items()
    }
    both = curves | dear
    loads = work | {f"dear {name}": load for name, load in work.items()}
    spent = spend_by_error(both, loads, saved)
    for name in curves:
        assert spent[name] >= spent[f"dear {name}"] - 1e-9


def test_spending_by_hand() -> None:
    curves = {"a": curve(0.0, 1.0, 3.0), "b": curve(0.0, 4.0, 4.5)}
    work = {"a": 10.0, "b": 20.0}
    # a: 0.1 and 0.2 a neuron; b: 0.2 and then, only after it, 0.025
    assert spend_by_error(curves, work, 5.0) == {"a": 0.5, "b": 0.0}
    assert spend_by_error(curves, work, 2.5) == {"a": 0.25, "b": 0.0}
    assert spend_by_error(curves, work, 30.0) == {"a": 1.0, "b": 1.0}
    assert spend_by_error(curves, work, 0.0) == {"a": 0.0, "b": 0.0}


def test_what_a_selector_cannot_reach_is_not_spent() -> None:
    curves = {"a": [Point(0.0, 0.0), Point(0.5, 1.0), Point(0.5, 1.0)], "b": curve(0.0, 9.0)}
    assert spend_by_error(curves, {"a": 10.0, "b": 10.0}, 8.0) == {"a": 0.5, "b": 0.3}
    assert spend_by_error(curves, {"a": 10.0, "b": 10.0}, 20.0) == {"a": 0.5, "b": 1.0}


# --- one line for all


def trained(router: str) -> PreTrainedModel:
    """A model whose FFNs have shares of their own: the first one keeps more."""
    model = attached(router=router)
    first, second = expert_ffns(model)
    if router == "sigmoid":
        for ffn, bias in ((first, 1.0), (second, -0.5)):
            torch.nn.init.normal_(ffn.router.weight, std=0.1)
            torch.nn.init.constant_(ffn.router.bias, bias)
    else:
        first.selector, second.selector = Threshold(0.001), Threshold(0.01)
    return model


@pytest.mark.parametrize("target", [0.3, 0.6])
@pytest.mark.parametrize("router", ["sigmoid", "oracle"])
def test_spend_common_moves_one_line(router: str, target: float, tmp_path: Path) -> None:
    model = trained(router)
    before = [ffn.selector.tau for ffn in expert_ffns(model)]
    biases = [ffn.router.logit_bias for ffn in expert_ffns(model)]
    was = [None if bias is None else bias.clone() for bias in biases]
    measured = budget(model, Budget(target, "common"), text())
    assert sparsity(model) == pytest.approx(target, abs=0.02)
    assert measured["sparsity"] == pytest.approx(sparsity(model), abs=1e-6)
    first, second = measured["given"].values()
    assert first < second  # as it was
    if router == "sigmoid":
        shifts = torch.cat([bias - old for bias, old in zip(biases, was, strict=True)])
        assert (shifts - shifts[0]).abs().max() < 1e-5
    else:
        taus = [ffn.selector.tau for ffn in expert_ffns(model)]
        assert taus[1] / taus[0] == pytest.approx(before[1] / before[0])
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", dtype=torch.float32)
    assert [one.selector for one in expert_ffns(again)] == [f.selector for f in expert_ffns(model)]


def test_spend_common_needs_thresholds() -> None:
    with pytest.raises(ValueError, match=r"needs a threshold; with top-k, k sets the sparsity"):
        budget(attached("topk"), Budget(0.5, "common"), text())
