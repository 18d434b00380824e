"""Predictors while they are in force, against the neurons themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.prediction import merge_predictions
from moe_tools.experts.routing import record_routing
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.predictions import count_predictions
from tests.families import build, logits, model_inputs


def text() -> Tensor:
    return torch.randint(5, 64, (3, 8), generator=torch.Generator().manual_seed(7))


def predicted(
    family: str,
    kind: str = "sign",
    size: int = 1,
    shared: int = 0,
    tau: float = 0.5,
    **options: Any,
) -> PreTrainedModel:
    model = build(family, **({"hidden_act": "relu"} if family == "mixtral" else {}))
    selector = {"kind": "threshold", "tau": tau}
    conversion = Conversion(
        "donor", size, kind, selector, shared_experts=shared, router_options=options
    )
    attach_experts(model, conversion)
    return model


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("opt", "sign", {}),
        ("t5-relu", "int8_gate", {}),
        ("opt", "low_rank", {"rank": 4}),
        ("llama", "low_rank", {"rank": 4, "zero_below": 0.3}),
    ],
)
@pytest.mark.parametrize("shared", [0, 5])
@torch.no_grad()
def test_counts_are_those_of_masks_and_neurons(
    family: str, kind: str, options: dict[str, Any], shared: int
) -> None:
    model = predicted(family, kind, shared=shared, **options)
    ffns, inputs = expert_ffns(model), {}
    for ffn in ffns:
        ffn.register_forward_pre_hook(lambda module, args: inputs.update({module.name: args[0]}))
    with count_predictions(model) as counts, record_routing(model) as routings:
        model(**model_inputs(model))
    assert list(counts) == [ffn.name for ffn in ffns]
    for ffn, routing in zip(ffns, routings, strict=True):
        h_TF = ffn.hidden(inputs[ffn.name]).abs()
        nonzero_TF = h_TF > options.get("zero_below", 0) * h_TF.amax(-1, keepdim=True)
        mask_TF, nonzero_TF = routing.mask_TE[..., shared:], nonzero_TF[..., shared:]
        count = counts[ffn.name]
        assert count.seen == mask_TF.numel() and count.on == mask_TF.sum()
        assert count.nonzero == nonzero_TF.sum()
        assert count.hits == (mask_TF & nonzero_TF).sum()


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_an_evaluation_has_every_predictor(family: str) -> None:
    model = predicted(family)
    seen = evaluate(model, text(), batch_size=2)
    assert list(seen.predictions) == [ffn.name for ffn in expert_ffns(model)]
    overall = merge_predictions(seen.predictions.values())
    assert overall.sparsity == pytest.approx(seen.ffn_sparsity)
    for name, sparsity in seen.layer_sparsity.items():
        assert seen.predictions[name].sparsity == pytest.approx(sparsity)
    assert 0 < overall.recall < 1


def test_where_nothing_is_0_nothing_is_predicted() -> None:
    model = build("llama")
    attach_experts(model, Conversion("donor", 1, "sign", {"kind": "threshold", "tau": 0.5}))
    assert evaluate(model, text()).predictions == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_with_all_of_its_margin_changes_no_relu_model(dtype: torch.dtype) -> None:
    """Recall 1, and so the donor's own output, with neurons off."""
    torch.manual_seed(0)
    donor = build("opt").to(dtype)
    torch.manual_seed(0)
    model = predicted("opt", "int8_gate", tau=0.0).to(dtype)
    assert torch.equal(logits(model), logits(donor))
    overall = merge_predictions(evaluate(model, text()).predictions.values())
    assert overall.recall == 1 and overall.precision > 0.9 and overall.sparsity > 0.3


def test_larger_experts_are_no_predictors() -> None:
    assert evaluate(predicted("opt", size=2), text()).predictions == {}
    assert evaluate(build("opt"), text()).predictions == {}


def test_counting_changes_nothing_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = predicted("opt")
    expected = logits(model)
    with count_predictions(model):
        assert torch.equal(logits(model), expected)
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, text())
    assert not any(ffn.observers for ffn in expert_ffns(model))
    assert not any(m._forward_pre_hooks for m in model.modules())
