"""Selectors against slow loops over experts, what tunes them, and their config entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.experts.sampling import sample_rows
from moe_tools.experts.selectors import (
    SELECTORS,
    DynamicK,
    Everything,
    Selector,
    Threshold,
    TopK,
    TopP,
    build_selector,
    describe_selector,
    tune_selector,
)

property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)
KINDS: dict[str, Selector] = {
    "threshold": Threshold(0.5),
    "topk": TopK(share=0.5),
    "dynamic_k": DynamicK(0.5),
    "top_p": TopP(0.5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
shapes = st.lists(st.integers(0, 4), max_size=2).flatmap(
    lambda leading: st.integers(1, 9).map(lambda experts: (*leading, experts))
)


@st.composite
def scored(draw: st.DrawFn, distinct: bool = False) -> Tensor:
    """Scores that are 64ths: sums and halves of them are exact, and many are equal."""
    shape = draw(shapes)
    torch.manual_seed(draw(st.integers(0, 99)))
    scores_TR = torch.randint(0, 65, shape) / 64
    if distinct:
        scores_TR = torch.rand(*shape).argsort(-1) + 1.0 + torch.rand(*shape) / 4
    return scores_TR


def rows(tensor: Tensor) -> list[list[Any]]:
    """One list a token."""
    return tensor.reshape(-1, tensor.shape[-1]).tolist()


def check(mask_TR: Tensor, scores_TR: Tensor, runs: Callable[[list[float]], set[int]]) -> None:
    """The mask runs the experts that `runs` names, token by token."""
    assert mask_TR.shape == scores_TR.shape and mask_TR.dtype == torch.bool
    for scores, mask in zip(rows(scores_TR), rows(mask_TR), strict=True):
        assert {expert for expert, on in enumerate(mask) if on} == runs(scores)


def ranked(scores: list[float]) -> list[int]:
    """Experts by score, best first; ties go to the lower expert."""
    return sorted(range(len(scores)), key=lambda expert: -scores[expert])


@given(scored(), st.integers(0, 64))
@property_test
def test_threshold_runs_what_is_above_tau(scores_TR: Tensor, sixty_fourths: int) -> None:
    tau = sixty_fourths / 64
    check(
        Threshold(tau)(scores_TR),
        scores_TR,
        lambda scores: {expert for expert, score in enumerate(scores) if score > tau},
    )


def test_a_score_equal_to_tau_stays_off() -> None:
    assert Threshold(0.5)(torch.tensor([0.5, 0.50001])).tolist() == [False, True]


def test_the_default_tau_is_that_of_the_paper() -> None:
    assert Threshold().tau == 0.5


@given(scored(distinct=True), st.integers(1, 9))
@property_test
def test_topk_runs_the_highest_scores(scores_TR: Tensor, k: int) -> None:
    k = min(k, scores_TR.shape[-1])
    check(TopK(k)(scores_TR), scores_TR, lambda scores: set(ranked(scores)[:k]))


@given(scored(distinct=True), st.integers(1, 20))
@property_test
def test_a_share_is_rounded_up_to_experts(scores_TR: Tensor, twentieths: int) -> None:
    """In whole numbers: 0.6 of 5 experts is 3, whatever the product rounds to."""
    k = -(-twentieths * scores_TR.shape[-1] // 20)
    mask_TR = TopK(share=twentieths / 20)(scores_TR)
    check(mask_TR, scores_TR, lambda scores: set(ranked(scores)[:k]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_turns_on_exactly_k_when_all_scores_are_equal(dtype: torch.dtype) -> None:
    assert TopK(3)(torch.zeros(5, 8, dtype=dtype)).sum(-1).tolist() == [3] * 5


def test_topk_of_all_experts_is_dense() -> None:
    assert TopK(6)(torch.randn(4, 6)).all()
    assert TopK(share=1.0)(torch.randn(4, 6)).all()


@given(scored(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
@property_test
def test_dynamic_k_runs_what_is_near_the_best(scores_TR: Tensor, tau: float) -> None:
    scores_TR[..., 0] = 1.0  # the quotient is exact
    check(
        DynamicK(tau)(scores_TR),
        scores_TR,
        lambda scores: {e for e, score in enumerate(scores) if score >= (1 - tau) * max(scores)},
    )


@given(scored(), st.integers(1, 16))
@property_test
def test_top_p_runs_the_fewest_that_add_up_to_p(scores_TR: Tensor, sixteenths: int) -> None:
    p = sixteenths / 16
    scores_TR[..., 0] += 1 / 64  # some score is above 0

    def runs(scores: list[float]) -> set[int]:
        order = ranked(scores)
        totals = [math.fsum(scores[e] for e in order[:k]) for k in range(len(order) + 1)]
        enough = (k for k in range(1, len(order)) if totals[k] / totals[-1] >= p - 1e-6)
        return set(order[: next(enough, len(order))])

    def near(scores: list[float]) -> bool:
        """A share that is p up to rounding could fall either way."""
        order = ranked(scores)
        totals = [math.fsum(scores[e] for e in order[:k]) for k in range(1, len(order) + 1)]
        return any(
            0 < abs(total / totals[-1] - p) < 1e-5 or total == p * totals[-1] for total in totals
        )

    mask_TR = TopP(p)(scores_TR)
    kept = torch.tensor([not near(scores) for scores in rows(scores_TR)], dtype=torch.bool)
    experts = scores_TR.shape[-1]
    check(mask_TR.reshape(-1, experts)[kept], scores_TR.reshape(-1, experts)[kept], runs)


def test_top_p_by_hand() -> None:
    scores_TR = torch.tensor([[1.0, 4.0, 2.0, 1.0]])
    for p, on in ((0.1, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.8, [0, 1, 2])):
        assert TopP(p)(scores_TR)[0].nonzero().flatten().tolist() == on
    assert TopP(1.0)(scores_TR).all()


@given(scored())
@property_test
def test_everything_runs(scores_TR: Tensor) -> None:
    assert Everything()(scores_TR).all()
    assert Everything()(scores_TR).shape == scores_TR.shape
    assert Everything().at(0.3) == Everything()


def test_a_mask_carries_no_gradient() -> None:
    scores_TR = torch.rand(2, 4, requires_grad=True)
    for selector in (*KINDS.values(), Everything()):
        assert not selector(scores_TR).requires_grad


# --- knobs


@every_kind
@given(scored(distinct=True), st.integers(1, 99))
@property_test
def test_an_expert_runs_once_the_limit_exceeds_its_own(
    kind: str, scores_TR: Tensor, percent: int
) -> None:
    """The one thing that `tune_selector` rests on, for limits inside the knob's range."""
    selector = KINDS[kind]
    limits_TR = selector.limits_TR(scores_TR)
    limit = percent / 100 if kind != "threshold" else -percent / 20
    clear = (limits_TR - limit).abs() > 1e-5
    mask_TR = selector.at(limit)(scores_TR)
    assert torch.equal(mask_TR[clear], (limits_TR < limit)[clear])


@every_kind
@given(scored(distinct=True), st.integers(0, 50))
@property_test
def test_tuning_reaches_the_density_within_an_expert_a_token(
    kind: str, scores_TR: Tensor, fiftieths: int
) -> None:
    """Ranks tie between tokens, and of a ratio-scale kind the best expert always runs."""
    tokens, experts = scores_TR.numel() // scores_TR.shape[-1], scores_TR.shape[-1]
    if not tokens:
        return
    density = fiftieths / 50
    selector = tune_selector(KINDS[kind], scores_TR, density)
    on = int(selector(scores_TR).sum())
    if kind == "threshold":
        assert abs(on - density * scores_TR.numel()) <= 0.5 + 1e-9  # half-way, both are nearest
    elif kind == "topk":
        assert abs(on - density * scores_TR.numel()) <= tokens
    else:
        wanted = max(round(density * scores_TR.numel()), tokens)
        assert wanted <= on <= wanted + 2 * tokens / experts + 1


@every_kind
def test_tuning_is_exact_on_many_tokens(kind: str) -> None:
    scores_TR = torch.rand(400, 10) + 0.01
    for density in (0.2, 0.3, 0.5, 0.8, 1.0):
        mask_TR = tune_selector(KINDS[kind], scores_TR, density)(scores_TR)
        assert mask_TR.double().mean() == pytest.approx(density, abs=1e-3)


@every_kind
def test_tuning_looks_at_a_sample_of_very_many_scores(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token beside the sample may score whatever it likes."""
    monkeypatch.setattr("moe_tools.experts.selectors.SAMPLE", 1500)
    scores_TR = torch.rand(4, 100, 10) + 0.01
    taken_T = sample_rows(torch.arange(400), 150)
    expected = tune_selector(KINDS[kind], scores_TR.flatten(0, 1)[taken_T], 0.3)
    others_T = torch.ones(400, dtype=torch.bool)
    others_T[taken_T] = False
    scores_TR.flatten(0, 1)[others_T] = 99
    assert tune_selector(KINDS[kind], scores_TR, 0.3) == expected


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_tuning_takes_negative_scores_where_shares_are_not_asked(kind: str) -> None:
    scores_TR = -torch.rand(100, 5) - 3
    assert not KINDS[kind].needs_ratio_scale
    mask_TR = tune_selector(KINDS[kind], scores_TR, 0.4)(scores_TR)
    assert mask_TR.double().mean() == pytest.approx(0.4, abs=1e-6)


@every_kind
@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_that_is_no_share_is_refused(kind: str, density: float) -> None:
    message = rf"^density is {density}, but must be in \[0, 1\]$"
    with pytest.raises(ValueError, match=message):
        tune_selector(KINDS[kind], torch.rand(3, 4), density)


@every_kind
def test_the_knob_alone_is_turned(kind: str) -> None:
    selector = KINDS[kind].with_knob(0.25)
    assert getattr(selector, selector.knob) == 0.25
    assert type(selector) is type(KINDS[kind])
    assert selector.with_knob(0.5) == KINDS[kind]


def test_topk_turns_a_share_in_place_of_k() -> None:
    assert TopK(3).with_knob(0.5) == TopK(share=0.5) == TopK(3).at(0.5)


# --- what is refused


@pytest.mark.parametrize("k", [0, -1])
def test_topk_needs_an_expert(k: int) -> None:
    with pytest.raises(ValueError, match=f"^top-k needs k >= 1, not {k}$"):
        TopK(k)


def test_topk_of_more_experts_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^top-k asks for 7 of 6 experts$"):
        TopK(7)(torch.rand(2, 6))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("topk", (0.0, -0.5, 1.1), r"top-k needs a share in \(0, 1\], not"),
        ("dynamic_k", (-0.1, 1.1), r"dynamic-k needs tau in \[0, 1\], not"),
        ("top_p", (0.0, 1.1), r"top-p needs p in \(0, 1\], not"),
    ],
)
def test_a_knob_beyond_its_range_is_refused(
    kind: str, values: tuple[float, ...], message: str
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{message} {value}$"):
            KINDS[kind].with_knob(value)


# --- config entries


@pytest.mark.parametrize(
    ("selector", "spec"),
    [
        (Threshold(0.25), {"kind": "threshold", "tau": 0.25}),
        (TopK(4), {"kind": "topk", "k": 4}),
        (TopK(share=0.3), {"kind": "topk", "share": 0.3}),
        (DynamicK(0.9), {"kind": "dynamic_k", "tau": 0.9}),
        (TopP(0.75), {"kind": "top_p", "p": 0.75}),
    ],
    ids=str,
)
def test_a_config_entry_gives_the_selector_back(selector: Selector, spec: dict[str, Any]) -> None:
    assert describe_selector(selector) == spec
    assert build_selector(spec) == selector


def test_every_kind_is_seen_here() -> None:
    assert set(KINDS) == set(SELECTORS)
    assert {name: type(selector) for name, selector in KINDS.items()} == dict(SELECTORS.items())


def test_arguments_have_defaults() -> None:
    assert build_selector({"kind": "threshold"}) == Threshold()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "treshold"}, "unknown selector 'treshold'; did you mean 'threshold'?"),
        ({"tau": 0.5}, "unknown selector ''"),
        ({"kind": "topk"}, "top-k needs either k or share"),
        ({"kind": "topk", "k": 2, "share": 0.5}, "top-k needs either k or share"),
        ({"kind": "top_p"}, "selector {'kind': 'top_p'}: .*missing .*'p'"),
        ({"kind": "threshold", "tua": 1}, "selector {.*}: .*'tua'"),
        ({"kind": "topk", "k": 0}, "top-k needs k >= 1, not 0"),
    ],
    ids=["kind", "no-kind", "no-k", "k-and-share", "missing", "unknown-argument", "bad-value"],
)
def test_a_wrong_config_entry_is_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_selector(spec)


@given(st.data())
@property_test
def test_ties_go_to_the_lower_expert(data: st.DataObject) -> None:
    """Scores as ReLU makes them: most are equal, and most of these are 0."""
    experts, tokens = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 20))
    drawn = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scores_TR = torch.randint(-3, 3, (tokens, experts), generator=drawn).clamp_min(0).float()
    k = data.draw(st.integers(1, experts))
    mask_TR = TopK(k)(scores_TR)
    for token, scores in enumerate(scores_TR.tolist()):
        best = sorted(range(experts), key=lambda expert: (-scores[expert], expert))[:k]
        assert mask_TR[token].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"kind": "threshold", "tau": "half"},
            "^threshold needs tau that is a number, not 'half'$",
        ),
        ({"kind": "threshold", "tau": True}, "^threshold needs tau that is a number, not True$"),
        ({"kind": "topk", "k": 2.5}, "^top-k needs k >= 1, not 2.5$"),
        ({"kind": "topk", "share": "all"}, "^top-k needs a share that is a number, not 'all'$"),
        ({"kind": "dynamic_k", "tau": None}, "^dynamic-k needs tau that is a number, not None$"),
        ({"kind": "top_p", "p": float("nan")}, "^top-p needs p that is a number, not nan$"),
    ],
)
def test_what_is_no_number_is_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_selector(spec)
