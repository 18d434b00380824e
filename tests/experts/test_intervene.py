"""Experts forced on or off, selectors at another setting, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_tools
from moe_tools.experts.conversion import Conversion, set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.intervene import intervene
from moe_tools.experts.routing import record_routing
from moe_tools.experts.selectors import SELECTORS, build_selector
from tests.families import EXPERT_SIZE, EXPERTS, build, logits, randomize, routed

FFN = "model.layers.1.mlp"


@pytest.fixture
def model():
    model, _ = routed(build("llama"))
    randomize(model)
    return model


def masks(model):
    with record_routing(model) as records:
        logits(model)
    return [record.mask_TE for record in records]


def test_forced_experts_run_for_every_token_or_for_none(model):
    before = masks(model)
    with intervene(model, on={FFN: [1, 4]}, off={FFN: [0]}):
        first, second = masks(model)
    assert second[..., [1, 4]].all() and not second[..., 0].any()
    assert torch.equal(second[..., [2, 3, 5]], before[1][..., [2, 3, 5]])
    assert torch.equal(first, before[0])


def test_an_expert_that_is_forced_off_adds_nothing(model):
    with intervene(model, off={1: [2]}):
        off = logits(model)
    down = expert_ffns(model)[1].down.weight
    with torch.no_grad():
        down[:, 2 * EXPERT_SIZE : 3 * EXPERT_SIZE] = 0  # what it would add, taken out by hand
    assert torch.equal(off, logits(model))


def test_every_expert_forced_on_is_the_dense_model():
    donor = build("llama")
    model, ffns = routed(donor)
    randomize(model)
    everything = {index: range(EXPERTS) for index in range(len(ffns))}
    assert not torch.equal(logits(model), logits(donor))
    with moe_tools.intervene(model, on=everything):
        assert torch.equal(logits(model), logits(donor))


def test_tau_changes_for_all_ffns_or_for_one(model):
    with record_routing(model) as records, intervene(model, tau=0.7):
        logits(model)
    assert all(torch.equal(record.mask_TE, record.scores_TE > 0.7) for record in records)
    with record_routing(model) as records, intervene(model, tau={FFN: 0.9}):
        logits(model)
    first, second = records
    assert torch.equal(first.mask_TE, first.scores_TE > 0.5)
    assert torch.equal(second.mask_TE, second.scores_TE > 0.9)


def test_a_shared_expert_can_be_turned_off():
    conversion = Conversion(
        "donor", EXPERT_SIZE, "sigmoid", {"kind": "topk", "share": 0.4}, shared_experts=1
    )
    model, _ = routed(build("llama"), conversion)
    assert all(mask[..., 0].all() for mask in masks(model))
    with intervene(model, off={0: [0]}, share=0.2):
        first, second = masks(model)
    assert not first[..., 0].any() and second[..., 0].all()
    assert (first.sum(-1) == 1).all()  # 0.2 of 5 routed experts


def test_afterwards_the_model_is_as_before_even_after_an_error(model):
    expected, selectors = logits(model), [ffn.selector for ffn in expert_ffns(model)]
    with pytest.raises(ArithmeticError), intervene(model, off={0: [0]}, tau=0.9):
        assert not torch.equal(logits(model), expected)
        raise ArithmeticError
    assert torch.equal(logits(model), expected)
    assert [ffn.selector for ffn in expert_ffns(model)] == selectors
    assert not any(ffn.interventions for ffn in expert_ffns(model))


def test_interventions_nest_and_the_inner_one_decides(model):
    with intervene(model, off={0: [3]}):
        with intervene(model, on={0: [3]}):
            assert masks(model)[0][..., 3].all()
        assert not masks(model)[0][..., 3].any()


def test_an_optimised_model_runs_the_forced_mask(model):
    with intervene(model, off={0: [0, 1]}, on={1: [5]}):
        expected = logits(model)
    moe_tools.optimize(model)
    with intervene(model, off={0: [0, 1]}, on={1: [5]}):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"off": {"model.layer.1.mlp": [0]}}, f"unknown FFN .* did you mean '{FFN}'"),
        ({"off": {2: [0]}}, "there is no FFN 2: the model has 2, from 0 on"),
        ({"on": {0: [EXPERTS]}}, "model.layers.0.mlp has 6 experts, from 0 on: .* no expert 6"),
        ({"on": {0: [1]}, "off": {"model.layers.0.mlp": [1]}}, "expert 1 cannot be both"),
        ({"share": 0.5}, r"unknown knob of model.layers.0.mlp 'share' \(known: tau\)"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(model, words, message):
    expected = logits(model)
    with pytest.raises(ValueError, match=message), intervene(model, **words):
        raise AssertionError("unreachable")
    assert torch.equal(logits(model), expected)


def test_a_value_that_the_selector_refuses_changes_nothing():
    conversion = Conversion("donor", EXPERT_SIZE, "sigmoid", {"kind": "topk", "share": 0.5})
    model, _ = routed(build("llama"), conversion)
    with pytest.raises(ValueError, match="share in"), intervene(model, share={0: 0.2, 1: 2.0}):
        raise AssertionError("unreachable")
    assert [ffn.selector.share for ffn in expert_ffns(model)] == [0.5, 0.5]


def test_mode_soft_has_nothing_to_force(model):
    set_mode(model, "soft")
    with pytest.raises(ValueError, match="is in mode soft"), intervene(model, off={0: [0]}):
        raise AssertionError("unreachable")


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="Module has no routed FFN"), intervene(nn.Module()):
        raise AssertionError("unreachable")


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "threshold", "tau": 0.4},
        {"kind": "topk", "k": 2},
        {"kind": "dynamic_k", "tau": 0.6},
        {"kind": "top_p", "p": 0.7},
    ],
)
def test_no_expert_below_the_threshold_runs_and_every_one_above_does(spec):
    scores_TE = torch.rand(50, EXPERTS)
    selector = build_selector(spec)
    mask_TE, threshold_T1 = selector(scores_TE), selector.threshold_T1(scores_TE)
    assert threshold_T1.shape == (50, 1)
    tolerance = 1e-6  # dynamic-k compares shares of the maximum
    assert not mask_TE[scores_TE < threshold_T1 - tolerance].any()
    assert mask_TE[scores_TE > threshold_T1 + tolerance].all()


def test_every_selector_is_checked_above():
    assert set(SELECTORS) == {"threshold", "topk", "dynamic_k", "top_p"}
