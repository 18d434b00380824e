"""Selectors against brute force, and their config entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_tools.model.selectors import (
    SELECTORS,
    Threshold,
    TopK,
    build_selector,
    describe_selector,
)


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (2, 3, 5), (0, 4), (7,)], ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_threshold_selects_scores_above_tau(shape: tuple[int, ...], tau: float) -> None:
    scores_TE = torch.rand(shape)
    mask_TE = Threshold(tau)(scores_TE)
    assert mask_TE.shape == shape
    assert mask_TE.dtype == torch.bool
    assert mask_TE.flatten().tolist() == [score > tau for score in scores_TE.flatten().tolist()]


def test_a_score_equal_to_tau_stays_off() -> None:
    assert Threshold(0.5)(torch.tensor([0.5, 0.50001])).tolist() == [False, True]


def test_the_default_tau_is_that_of_the_paper() -> None:
    assert Threshold().tau == 0.5


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 1), 1), ((4, 6), 1), ((4, 6), 5), ((2, 3, 5), 2), ((0, 4), 2), ((7,), 3)]
)
def test_topk_selects_the_highest_scores(shape: tuple[int, ...], k: int) -> None:
    scores_TE = torch.rand(shape)
    experts = shape[-1]
    mask_TE = TopK(k)(scores_TE)
    assert mask_TE.shape == shape
    assert mask_TE.dtype == torch.bool
    for scores, mask in zip(
        scores_TE.view(-1, experts).tolist(), mask_TE.view(-1, experts).tolist(), strict=True
    ):
        best = sorted(range(experts), key=lambda expert: -scores[expert])[:k]
        assert [expert for expert in range(experts) if mask[expert]] == sorted(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_turns_on_exactly_k_when_all_scores_are_equal(dtype: torch.dtype) -> None:
    assert TopK(3)(torch.zeros(5, 8, dtype=dtype)).sum(-1).tolist() == [3] * 5


def test_topk_of_all_experts_is_dense() -> None:
    assert TopK(6)(torch.randn(4, 6)).all()


def test_a_mask_carries_no_gradient() -> None:
    scores_TE = torch.rand(2, 4, requires_grad=True)
    for selector in (Threshold(), TopK(2)):
        assert not selector(scores_TE).requires_grad


@pytest.mark.parametrize("k", [0, -1])
def test_topk_needs_an_expert(k: int) -> None:
    with pytest.raises(ValueError, match=f"^top-k needs k >= 1, not {k}$"):
        TopK(k)


def test_topk_of_more_experts_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^top-k asks for 7 of 6 experts$"):
        TopK(7)(torch.rand(2, 6))


@pytest.mark.parametrize(
    ("selector", "spec"),
    [
        (Threshold(0.25), {"kind": "threshold", "tau": 0.25}),
        (TopK(4), {"kind": "topk", "k": 4}),
    ],
    ids=["threshold", "topk"],
)
def test_a_config_entry_gives_the_selector_back(
    selector: Threshold | TopK, spec: dict[str, Any]
) -> None:
    assert describe_selector(selector) == spec
    assert build_selector(spec) == selector
    assert spec["kind"] in SELECTORS


def test_arguments_have_defaults() -> None:
    assert build_selector({"kind": "threshold"}) == Threshold()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "treshold"}, "unknown selector 'treshold'; did you mean 'threshold'?"),
        ({"tau": 0.5}, "unknown selector ''"),
        ({"kind": "topk"}, "selector {'kind': 'topk'}: .*missing .*'k'"),
        ({"kind": "threshold", "tua": 1}, "selector {.*}: .*'tua'"),
        ({"kind": "topk", "k": 0}, "top-k needs k >= 1, not 0"),
    ],
    ids=["kind", "no-kind", "missing-argument", "unknown-argument", "bad-value"],
)
def test_a_wrong_config_entry_is_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_selector(spec)
