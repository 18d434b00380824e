"""Neuron predictors without training, against slow loops and against the neurons themselves."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.division import Division
from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import Int8GateRouter, Router, SignRouter
from moe_tools.experts.routers.base import Scoring
from moe_tools.experts.selectors import Threshold
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import FFN, Layout
from moe_tools.hosts.firing import firing_rows
from tests.families import NEURONS, SIZES, UNEVEN, build

KINDS: dict[str, type[Router]] = {"sign": SignRouter, "int8_gate": Int8GateRouter}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "t5-gated"])
property_test = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def attached(kind: str, family: str, size: int = 1, shared: int = 0) -> ExpertFFN:
    conversion = Conversion("donor", size, kind, {"kind": "threshold"}, shared_experts=shared)
    return attach_experts(build(family), conversion)[0]


def relu_ffn(rows_FD: Tensor, bias_F: Tensor | None) -> FFN:
    """A plain FFN with such rows."""
    up = nn.Linear(*reversed(rows_FD.shape), bias=bias_F is not None)
    with torch.no_grad():
        up.weight.copy_(rows_FD)
        if bias_F is not None:
            up.bias.copy_(bias_F)
    parts = {"up": up, "act": nn.ReLU(), "down": nn.Linear(*rows_FD.shape)}
    return FFN("ffn", nn.ModuleDict(parts), Layout("up", "down", "act"))


def predictor(kind: str, rows_FD: Tensor, bias_F: Tensor | None = None) -> Router:
    ffn = relu_ffn(rows_FD, bias_F)
    importance = Importance(Division(len(rows_FD), len(rows_FD)), 0, ffn.weights().down_FD)
    return KINDS[kind].build(ffn, importance)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_TD, rows_FD and maybe a bias_F, of any size and scale, some exactly zero."""
    tokens, width, neurons = (draw(st.integers(low, 12)) for low in (0, 1, 1))
    torch.manual_seed(draw(st.integers(0, 999)))
    x_TD = torch.randn(tokens, width) * 10.0 ** draw(st.integers(-4, 4))
    rows_FD = torch.randn(neurons, width) * 10.0 ** torch.randint(-4, 4, (neurons, 1))
    if draw(st.booleans()):
        x_TD, rows_FD = x_TD.round(), rows_FD.round()
    return x_TD, rows_FD, torch.randn(neurons).round() if draw(st.booleans()) else None


# --- when a neuron fires


SWAPS: list[dict[str, Any]] = [
    {"kind": "relu"},
    {"kind": "fatrelu", "theta": 0.3},
    {"kind": "shifted_relu", "shift": 0.2},
    {"kind": "drelu"},
]


def swapped(kind: str, family: str, activation: dict[str, Any]) -> ExpertFFN:
    model = build(family)
    swap_activations(model, Conversion("donor", activation=activation))
    conversion = read_conversion(model)
    assert conversion is not None
    routed = {"expert_size": 1, "router": kind, "selector": {"kind": "threshold"}}
    return attach_experts(model, replace(conversion, **routed))[0]


GATED = ("llama", "phi3", "t5-gated")
PAIRS = [
    pytest.param(family, spec, id=f"{family}-{spec['kind']}")
    for family in (*GATED, "gpt2", "opt")
    for spec in SWAPS
    if spec["kind"] != "drelu" or family in GATED
]


@pytest.mark.parametrize(("family", "activation"), PAIRS)
@torch.no_grad()
def test_a_neuron_fires_where_its_rows_say(family: str, activation: dict[str, Any]) -> None:
    projections = swapped("sign", family, activation).projections
    x_TD = torch.randn(50, 16)
    fires_TF = torch.ones(50, NEURONS, dtype=torch.bool)
    for rows_FD, bias_F, threshold in firing_rows(projections):
        fires_TF &= nn.functional.linear(x_TD, rows_FD, bias_F) > threshold
    assert torch.equal(projections.hidden_TF(x_TD) != 0, fires_TF)


@torch.no_grad()
def test_int8_misses_nothing_above_a_threshold() -> None:
    ffn = swapped("int8_gate", "llama", {"kind": "fatrelu", "theta": 0.3})
    x_TD = torch.randn(200, 16)
    fires_TF = ffn.projections.hidden_TF(x_TD) != 0
    scores_TF = ffn.router(x_TD)
    assert (Threshold(0.0)(scores_TF) >= fires_TF).all()
    assert (Threshold(0.5)(scores_TF) == fires_TF).double().mean() > 0.97


# --- sign


@given(products(), st.sampled_from([1.0, 1.03, 1.1, 1.5]))
@property_test
@torch.no_grad()
def test_sign_is_the_rule_of_sparseinfer(
    case: tuple[Tensor, Tensor, Tensor | None], alpha: float
) -> None:
    x_TD, rows_FD, bias_F = case
    mask_TF = Threshold(1 / (1 + alpha) - 1e-6)(predictor("sign", *case[1:])(x_TD))
    assert mask_TF.shape == (len(x_TD), len(rows_FD))
    for token, x in enumerate(x_TD.tolist()):
        for neuron, row in enumerate(rows_FD.tolist()):
            pairs = list(zip(x, row, strict=True))
            if bias_F is not None:
                pairs.append((1.0, bias_F[neuron].item()))
            negative = sum((one < 0) != (other < 0) for one, other in pairs)
            off = negative > alpha * (len(pairs) - negative)
            assert mask_TF[token, neuron].item() != off


def test_sign_scores_are_shares() -> None:
    scores_TF = predictor("sign", torch.tensor([[1.0, -2.0, 3.0, 0.0]]))(
        torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, 9.0, -1.0, -1.0], [0.0, 0.0, -0.0, 0.0]])
    )
    assert scores_TF.tolist() == [[0.75], [0.0], [0.75]]


@pytest.mark.parametrize("width", [16, 32, 33])
def test_sign_counts_words(width: int) -> None:
    words = 2 if width == 33 else 1
    scoring = predictor("sign", torch.randn(10, width)).scoring()
    assert scoring == Scoring(flops=0, bits=32 * 10 * words, few_bit_ops=4 * 10 * words)


# --- int8


def by_hand(values: list[float]) -> tuple[list[int], float]:
    scale = max(abs(value) for value in values) / 127
    return [round(value / scale) for value in values], scale


@torch.no_grad()
def test_int8_by_hand() -> None:
    x_TD, rows_FD, bias_F = torch.randn(4, 9), torch.randn(5, 9), torch.randn(5)
    scores_TF = predictor("int8_gate", rows_FD, bias_F)(x_TD)
    for token, x in enumerate(x_TD.tolist()):
        q_x, s_x = by_hand(x)
        for neuron, row in enumerate(rows_FD.tolist()):
            q_w, s_w = by_hand(row)
            estimate = s_x * s_w * sum(a * b for a, b in zip(q_x, q_w, strict=True))
            estimate += bias_F[neuron].item()
            bound = (s_x * s_w * sum(map(abs, q_w)) + s_w * sum(map(abs, x))) / 2
            expected = max(0.0, (estimate + bound) / (2 * bound))
            # the bound is widened for rounding, by 13 / 2^15
            assert scores_TF[token, neuron].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(products())
@property_test
@torch.no_grad()
def test_int8_misses_no_neuron_that_fires(case: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Recall is exact at tau 0, and a score of more than 1 is certain, too."""
    x_TD, rows_FD, bias_F = case
    router = predictor("int8_gate", rows_FD, bias_F)
    scores_TF = router(x_TD)
    assert torch.isfinite(scores_TF).all()
    fires_TF = router.projections.hidden_TF(x_TD) > 0
    exact_TF = x_TD.double() @ rows_FD.double().T + (0 if bias_F is None else bias_F.double())
    for truth_TF in (fires_TF, exact_TF > 0):
        assert Threshold(0.0)(scores_TF)[truth_TF].all()
        assert truth_TF[scores_TF > 1.001].all()


@pytest.mark.parametrize("width", [64, 1024, 4096])
@torch.no_grad()
def test_int8_misses_none_at_the_edge(width: int) -> None:
    """Rows that are moved until their pre-activations nearly vanish: all within the margin."""
    torch.manual_seed(0)
    x_TD, rows_FD = torch.randn(8, width), torch.randn(64, width)
    for x_D in x_TD:
        edge_FD = rows_FD - (rows_FD @ x_D / x_D.square().sum())[:, None] * x_D
        router = predictor("int8_gate", edge_FD)
        assert Threshold(0.0)(router(x_D[None])).all()
        bias_F = torch.full((64,), -0.1 * width)  # far from the edge, they are off for certain
        assert not Threshold(0.0)(predictor("int8_gate", edge_FD, bias_F)(x_D[None])).any()


@torch.no_grad()
def test_the_margin_is_a_matter_of_tau() -> None:
    """From no margin to all of it: fewer misses, more neurons."""
    x_TD, rows_FD = torch.randn(500, 64), torch.randn(200, 64)
    router = predictor("int8_gate", rows_FD)
    scores_TF, fires_TF = router(x_TD), x_TD @ rows_FD.T > 0
    on, missed = [], []
    for tau in (0.5, 0.45, 0.25, 0.0):
        mask_TF = Threshold(tau)(scores_TF)
        on.append(mask_TF.double().mean().item())
        missed.append((fires_TF & ~mask_TF).double().mean().item())
    assert on == sorted(on) and missed == sorted(missed, reverse=True)
    assert 0 < missed[0] < 0.01 and missed[-1] == 0
    assert on[0] == pytest.approx(0.5, abs=0.02) and on[-1] < 0.6


# --- both


@every_kind
@every_family
@torch.no_grad()
def test_any_ffn_can_be_scored(kind: str, family: str) -> None:
    """Whatever its activation; estimates of neurons that fire under ReLU are higher."""
    ffn = attached(kind, family)
    x_TD = torch.randn(200, 16)
    scores_TF = ffn.router(x_TD)
    assert scores_TF.shape == (200, NEURONS) and not list(ffn.router.parameters())
    ((rows_FD, bias_F, _),) = firing_rows(ffn.projections)
    fires_TF = nn.functional.linear(x_TD, rows_FD, bias_F) > 0
    right = (Threshold(0.5)(scores_TF) == fires_TF).double().mean()
    assert right > (0.7 if kind == "sign" else 0.97)


@every_kind
@torch.no_grad()
def test_an_expert_is_its_best_neuron(kind: str) -> None:
    torch.manual_seed(0)
    ffn = attached(kind, "opt", UNEVEN, shared=1)
    torch.manual_seed(0)
    single = attached(kind, "opt")
    x_TD = torch.randn(9, 16)
    parts = single.router(x_TD).split(SIZES[UNEVEN], -1)[1:]
    assert torch.equal(ffn.router(x_TD), torch.stack([part.amax(-1) for part in parts], -1))


@every_kind
@torch.no_grad()
def test_a_neuron_with_two_conditions_has_to_meet_both(kind: str) -> None:
    """As of h = max(0, gate x) max(0, up x)."""
    single = swapped(kind, "llama", {"kind": "relu"}).router
    router = swapped(kind, "llama", {"kind": "drelu"}).router
    x_TD = torch.randn(30, 16)
    gate, up = firing_rows(router.projections)
    expected_TF = torch.minimum(router.score_TF(x_TD, gate), router.score_TF(x_TD, up))
    assert torch.equal(router(x_TD), expected_TF)
    assert router.scoring().few_bit_ops == 2 * single.scoring().few_bit_ops > 0


@every_kind
def test_they_read_the_hosts_rows_and_keep_none(kind: str) -> None:
    ffn = attached(kind, "opt")
    assert not ffn.router.state_dict()
    twin, x_TD = copy.deepcopy(ffn), torch.randn(9, 16)
    before_TR = ffn.router(x_TD)
    assert not before_TR.requires_grad
    with torch.no_grad():
        ffn.weights().up_FD.neg_()
    assert not torch.equal(ffn.router(x_TD), before_TR)
    assert torch.equal(twin.router(x_TD), before_TR)


@every_kind
def test_they_take_no_options(kind: str) -> None:
    conversion = Conversion(
        "donor", 1, kind, {"kind": "threshold"}, router_options={"alpha": math.e}
    )
    with pytest.raises(ValueError, match=rf"^router {kind} with {{'alpha': 2.7.*'alpha'"):
        attach_experts(build("opt"), conversion)
