"""Mode weighted: against a loop over tokens and experts, and against stock MoE blocks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import moe_tools
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import (
    Conversion,
    attach_experts,
    conversion_so_far,
    read_conversion,
    set_mode,
    write_conversion,
)
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.intervene import intervene
from moe_tools.experts.weighted import LEAST, weights_TR
from moe_tools.recipe import Attach, Split, Train
from moe_tools.steps.attach import attach
from moe_tools.steps.refit import Refit, refit
from moe_tools.training.checks import check_train
from tests.families import NEURONS, build, every_size, logits

TOP = Conversion("donor", 8, "softmax", {"kind": "topk", "k": 2}, "weighted")
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {},
    "sigmoid without a bias": {"bias": False},
    "norm": {},
    "representative": {},
}
every_router = pytest.mark.parametrize("kind", KINDS)


def made(family: str = "llama", host: dict[str, Any] | None = None, **changes: Any) -> ExpertFFN:
    """One FFN in mode weighted, its router shaken so that weights differ."""
    ffn = attach_experts(build(family, **(host or {})), replace(TOP, **changes))[0]
    with torch.no_grad():
        for parameter in ffn.router.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ffn


def of_kind(kind: str) -> dict[str, Any]:
    return {"router": kind.split()[0], "router_options": KINDS[kind]}


def loop(ffn: ExpertFFN, x_TD: Tensor) -> Tensor:
    """y_TD, token by token and expert by expert, from the FFN's own rows."""
    weights, sizes = ffn.weights(), ffn.division.sizes
    ups, downs = weights.up_FD.split(sizes), weights.down_FD.split(sizes)
    gates = [None] * len(ups) if weights.gate_FD is None else weights.gate_FD.split(sizes)

    def expert(number: int, x_D: Tensor) -> Tensor:
        start = sum(sizes[:number])
        neurons = slice(start, start + sizes[number])
        up_N = ups[number] @ x_D
        if weights.up_F is not None:
            up_N = up_N + weights.up_F[neurons]
        if gates[number] is None:
            return ffn.projections.act(up_N) @ downs[number]
        gate_N = gates[number] @ x_D
        if weights.gate_F is not None:
            gate_N = gate_N + weights.gate_F[neurons]
        return ffn.projections.act(gate_N) * up_N @ downs[number]

    rows = []
    for x_D in x_TD:
        y_D = torch.zeros_like(x_D) if weights.down_D is None else weights.down_D
        for number in range(ffn.shared):
            y_D = y_D + expert(number, x_D)
        scores_R = ffn.router(x_D)
        chosen = ffn.selector(scores_R).nonzero().flatten().tolist()
        total = sum(scores_R[e] for e in chosen)
        for e in chosen:
            y_D = y_D + len(chosen) * scores_R[e] / total * expert(ffn.shared + e, x_D)
        rows.append(y_D)
    return torch.stack(rows)


# --- what it computes


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 4])
@every_size
@torch.no_grad()
def test_it_is_a_loop_over_experts(size: int, k: int, shared: int, family: str) -> None:
    ffn = made(family, expert_size=size, selector={"kind": "topk", "k": k}, shared_experts=shared)
    x_TD = torch.randn(2, 5, 16)
    expected = loop(ffn, x_TD.flatten(0, 1)).view(2, 5, 16)
    torch.testing.assert_close(ffn(x_TD), expected, rtol=1e-5, atol=1e-6)


SELECTORS = {
    "threshold": {"kind": "threshold", "tau": 0.17},
    "topk": {"kind": "topk", "share": 0.5},
    "dynamic_k": {"kind": "dynamic_k", "tau": 0.3},
    "top_p": {"kind": "top_p", "p": 0.6},
}


@every_router
@pytest.mark.parametrize("selector", SELECTORS)
@torch.no_grad()
def test_every_router_and_selector_weighs_so(selector: str, kind: str) -> None:
    ffn = made(**of_kind(kind), selector=SELECTORS[selector], shared_experts=1)
    x_TD = torch.randn(9, 16)
    torch.testing.assert_close(ffn(x_TD), loop(ffn, x_TD), rtol=1e-5, atol=1e-6)


@every_size
@torch.no_grad()
def test_equal_scores_are_mode_hard(size: int) -> None:
    ffn = made(expert_size=size, shared_experts=1)
    ffn.router.weight.zero_()
    x_TD = torch.randn(9, 16)
    weighted_TD = ffn(x_TD)
    ffn.mode = "hard"
    torch.testing.assert_close(weighted_TD, ffn(x_TD), rtol=1e-6, atol=1e-7)


scores = st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=9)


@given(scores, st.integers(0, 2**9 - 1), st.floats(2.0**-6, 2.0**6, width=32))
def test_weights_add_up_to_the_number_chosen(values: list[float], bits: int, scale: float) -> None:
    scores_TR = torch.tensor([values])
    mask_TR = torch.tensor([[bool(bits >> at & 1) for at in range(len(values))]])
    found_TR = weights_TR(scores_TR, mask_TR)
    assert (found_TR[~mask_TR] == 0).all() and (found_TR >= 0).all()
    nothing = float(scores_TR[mask_TR].sum()) < LEAST
    wanted = 0.0 if nothing else float(mask_TR.sum())
    assert float(found_TR.sum()) == pytest.approx(wanted, rel=1e-5)
    if not nothing and float(scores_TR[mask_TR].sum()) * scale > LEAST:
        scaled_TR = weights_TR(scores_TR * scale, mask_TR)  # shares have no scale
        torch.testing.assert_close(scaled_TR, found_TR, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, torch.nan], [0.0, torch.inf], [1e-30, 1.0]])
def test_a_choice_worth_nothing_weighs_nothing(values: list[float]) -> None:
    """Nor does the score of an expert that is off reach anything."""
    scores_TR = torch.tensor([values], requires_grad=True)
    found_TR = weights_TR(scores_TR, torch.tensor([[True, False]]))
    found_TR.sum().backward()
    assert (found_TR == 0).all() and scores_TR.grad is not None
    assert (scores_TR.grad == 0).all()
    assert (weights_TR(scores_TR, torch.tensor([[False, False]])) == 0).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_off_stays_off_whatever_it_is(value: float) -> None:
    ffn = made(selector={"kind": "topk", "k": 2})
    x_TD = torch.randn(5, 16)
    routing = ffn.route(x_TD)
    h_TF = ffn.hidden(x_TD).detach()
    off_TF = ffn.division.spread_TF(~routing.mask_TE)
    plain_TF = ffn.switch(h_TF, routing)
    assert torch.equal(ffn.switch(h_TF.masked_fill(off_TF, value), routing), plain_TF)
    ffn.switch(h_TF.masked_fill(off_TF, value), routing).sum().backward()
    assert ffn.router.weight.grad.isfinite().all()


@torch.no_grad()
def test_forced_masks_are_what_is_shared_out() -> None:
    model = build("llama")
    ffn = attach_experts(model, replace(TOP, shared_experts=1))[0]
    x_TD = torch.randn(9, 16)
    seen: list[Tensor] = []
    ffn.observers.append(lambda routing: seen.append(routing.mask_TE))
    with intervene(model, off={0: [0, 2]}, on={0: [4]}):
        y_TD = ffn(x_TD)
        assert not seen[0][:, [0, 2]].any() and seen[0][:, 4].all()
        mask_TE, scores_TR = seen[0], ffn.router(x_TD)
    h_TF, weight_TE = ffn.hidden(x_TD), torch.zeros(mask_TE.shape)
    for token, chosen_R in enumerate(mask_TE[:, 1:]):
        on = chosen_R.nonzero().flatten()
        weight_TE[token, 1 + on] = len(on) * scores_TR[token, on] / scores_TR[token, on].sum()
    expected = ffn.projections.project_TD(h_TF * ffn.division.spread_TF(weight_TE))
    torch.testing.assert_close(y_TD, expected, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing() -> None:
    model = build("llama")
    attach_experts(model, replace(TOP, shared_experts=1))
    ids = torch.randint(3, 64, (1, 7))
    padded = torch.cat([torch.zeros_like(ids), ids], 1)
    mask = torch.cat([torch.zeros_like(ids), torch.ones_like(ids)], 1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        beside = model(input_ids=padded, attention_mask=mask).logits[:, 7:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_every_expert_on_a_model_is_its_host() -> None:
    donor = build("llama")
    model = copy.deepcopy(donor)
    attach_experts(model, replace(TOP, shared_experts=1))
    with every_expert_on(model):
        assert torch.equal(logits(model), logits(donor))
    assert {ffn.mode for ffn in expert_ffns(model)} == {"weighted"}


# --- gradients


@every_router
@pytest.mark.parametrize("shared", [0, 1])
@every_size
def test_gradients_are_those_of_the_loop(size: int, shared: int, kind: str) -> None:
    ffn = made(**of_kind(kind), expert_size=size, shared_experts=shared)
    x_TD, direction_TD = torch.randn(9, 16), torch.randn(9, 16)
    names = [name for name, _ in ffn.named_parameters()]

    def gradients(y_TD: Tensor) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(
            (y_TD * direction_TD).sum(), list(ffn.parameters()), allow_unused=True
        )
        return dict(zip(names, found, strict=True))

    fast, slow = gradients(ffn(x_TD)), gradients(loop(ffn, x_TD))
    if kind != "representative":
        learned = fast["router.weight" if "router.weight" in fast else "router.second.weight"]
        assert learned is not None and learned.count_nonzero() > 0
    for name, expected in slow.items():
        got = fast[name]
        assert (got is None) == (expected is None), name
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_are_those_of_finite_differences() -> None:
    scores_TR = torch.rand(4, 6, dtype=torch.double).add_(0.1).requires_grad_()
    mask_TR = torch.rand(4, 6) < 0.6

    def slow(scores_TR: Tensor) -> Tensor:
        chosen_TR = scores_TR * mask_TR
        return mask_TR.sum(-1, keepdim=True) * chosen_TR / chosen_TR.sum(-1, keepdim=True)

    mask_TR[:, 0] = True
    torch.autograd.gradcheck(slow, scores_TR)
    grads = [
        torch.autograd.grad(function(scores_TR).square().sum(), scores_TR)[0]
        for function in (slow, lambda scores_TR: weights_TR(scores_TR, mask_TR))
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


# --- stock blocks


PLAIN = {"mlp_bias": False}
"""Stock experts have no biases."""


def experts_of(ffn: ExpertFFN, block: Any, scale: float) -> None:
    """Copies the routed experts of a llama's FFN into fused ones, whose outputs are scaled."""
    weights, shared = ffn.weights(), sum(ffn.division.sizes[: ffn.shared])
    assert weights.gate_FD is not None
    count = ffn.division.num_experts - ffn.shared

    def rows(matrix_FD: Tensor) -> Tensor:
        return matrix_FD[shared:].unflatten(0, (count, -1))

    gate_up = torch.cat([rows(weights.gate_FD), rows(weights.up_FD)], dim=1)
    block.experts.gate_up_proj.copy_(gate_up)
    block.experts.down_proj.copy_(scale * rows(weights.down_FD).transpose(1, 2))
    block.gate.weight.copy_(ffn.router.weight)


@pytest.mark.parametrize("k", [1, 2, 5])
@torch.no_grad()
def test_mixtral_computes_the_same(k: int) -> None:
    """Its weights add up to 1: W_down is k times ours."""
    ffn = made(host=PLAIN, selector={"kind": "topk", "k": k})
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=8,
        num_local_experts=NEURONS // 8,
        num_experts_per_tok=k,
        hidden_act="silu",
    )
    block = MixtralSparseMoeBlock(config).eval()
    experts_of(ffn, block, scale=k)
    x_TD = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(x_TD), ffn(x_TD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_glm4_moe_computes_the_same(k: int, shared: int) -> None:
    """Its routed_scaling_factor is k."""
    routed = NEURONS // 8 - shared
    ffn = made(
        host=PLAIN,
        router="sigmoid",
        router_options={"bias": False},
        selector={"kind": "topk", "k": k},
        shared_experts=shared,
    )
    config = Glm4MoeConfig(
        hidden_size=16,
        moe_intermediate_size=8,
        n_routed_experts=routed,
        n_shared_experts=shared,
        num_experts_per_tok=k,
        routed_scaling_factor=float(k),
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        hidden_act="silu",
    )
    block = Glm4MoeMoE(config).eval()
    experts_of(ffn, block, scale=1.0)
    weights, mine = ffn.weights(), block.shared_experts
    assert weights.gate_FD is not None
    mine.gate_proj.weight.copy_(weights.gate_FD[: 8 * shared])
    mine.up_proj.weight.copy_(weights.up_FD[: 8 * shared])
    mine.down_proj.weight.copy_(weights.down_FD[: 8 * shared].T)
    x_TD = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(x_TD), ffn(x_TD), rtol=1e-5, atol=1e-6)


# --- numbers


@every_router
@torch.no_grad()
def test_weights_are_fp32_under_any_dtype(kind: str) -> None:
    ffn = made(**of_kind(kind), shared_experts=1)
    x_TD = torch.randn(9, 16).bfloat16()
    exact_TD = ffn(x_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ffn(x_TD.float()).float(), exact_TD, rtol=0.05, atol=0.02)
    ffn.bfloat16()
    y_TD = ffn(x_TD)
    assert y_TD.dtype == torch.bfloat16
    torch.testing.assert_close(y_TD.float(), exact_TD, rtol=0.05, atol=0.05)


def test_autocast_trains() -> None:
    ffn = made(shared_experts=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ffn(torch.randn(9, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ffn.parameters())
    assert ffn.router.weight.grad.dtype == torch.float32
    assert ffn.router.weight.grad.count_nonzero() > 0


# --- the model and its folder


@pytest.mark.parametrize("kind", ["softmax", "sigmoid without a bias"])
def test_a_folder_is_what_was_saved(tmp_path: Path, kind: str) -> None:
    model = build("llama")
    attach_experts(model, replace(TOP, **of_kind(kind), shared_experts=1))
    with torch.no_grad():
        for ffn in expert_ffns(model):
            ffn.router.weight.normal_()
    save(model, tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert torch.equal(logits(again), logits(model))
    conversion = read_conversion(again)
    assert conversion is not None and (conversion.mode, conversion.format) == ("weighted", 3)
    assert {ffn.mode for ffn in expert_ffns(again)} == {"weighted"}
    set_mode(again, "hard")
    assert not torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@torch.no_grad()
def test_steps_start_it(router: str) -> None:
    """A recipe's attach: scores near each other, so that weights are near 1."""
    options = {"softmax": {"spread": 0.1}, "sigmoid": {"bias": False, "spread": 0.1}}[router]
    model, text = build("llama"), torch.randint(3, 64, (8, 32))
    so_far = Split(expert_size=8).conversion(conversion_so_far(model, "donor"))
    write_conversion(model, so_far)
    step = Attach(router, options, {"kind": "topk", "k": 3}, mode="weighted")
    attach(model, step, so_far, text)
    conversion = read_conversion(model)
    assert conversion is not None and conversion.mode == "weighted"
    routings: list[Any] = []
    for ffn in expert_ffns(model):
        ffn.observers.append(routings.append)
    model(input_ids=text)
    assert len(routings) == 2
    for routing in routings:
        scores_TR = routing.scores_TE
        logits_TR = scores_TR.log() if router == "softmax" else scores_TR.logit()
        logits_TR = logits_TR - logits_TR.mean(-1, keepdim=True)
        assert float(logits_TR.std()) == pytest.approx(0.1, rel=0.05)
        weights = weights_TR(scores_TR, routing.mask_TE)[routing.mask_TE]
        assert 0.7 < float(weights.min()) < 1 < float(weights.max()) < 1.4


# --- refusals


REFUSED = {
    "mode weighted goes without when_off: mean": {"when_off": "mean"},
    "mode weighted goes without the constants of refit": {"constants": True},
    "SimilarityRouter scores below 0": {"router": "similarity"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_weight_is_refused_and_changes_nothing(message: str, tmp_path: Path) -> None:
    wrong = replace(TOP, **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        attach_experts(build("llama"), wrong)
    model = build("llama")
    attach_experts(model, replace(wrong, mode="hard"))
    with pytest.raises(ValueError, match=message):
        set_mode(model, "weighted")
    assert {ffn.mode for ffn in expert_ffns(model)} == {"hard"}
    with pytest.raises(ValueError, match=message):
        check_train(model, Train(tokens=1, mode="weighted"), donor=None)
    for ffn in expert_ffns(model):
        ffn.mode = "weighted"
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "folder")


def test_refit_is_refused() -> None:
    model = build("llama")
    attach_experts(model, TOP)
    with pytest.raises(ValueError, match="is in mode weighted, and refit solves for experts"):
        refit(model, Refit(), torch.randint(3, 64, (2, 8)))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "triton"])
def test_kernels_are_refused(backend: Any) -> None:
    model = build("llama")
    attach_experts(model, TOP)
    with pytest.raises(ValueError, match="take no weight for each expert, as mode weighted has"):
        moe_tools.optimize(model.eval(), backend=backend)


def test_an_optimised_model_does_not_become_weighted() -> None:
    model = build("llama").eval()
    attach_experts(model, replace(TOP, mode="hard"))
    moe_tools.optimize(model)
    set_mode(model, "weighted")
    with pytest.raises(ValueError, match="is optimised and cannot run in mode weighted"):
        logits(model)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid without a bias"])
def test_a_target_needs_a_threshold_and_no_bias(kind: str) -> None:
    step = Train(tokens=1, mode="weighted", target_sparsity=0.3)
    model = build("llama")
    attach_experts(model, replace(TOP, **of_kind(kind), selector={"kind": "threshold", "tau": 0.1}))
    check_train(model, step, donor=None)
    top = build("llama")
    attach_experts(top, replace(TOP, **of_kind(kind)))
    with pytest.raises(ValueError, match="a target sparsity needs a threshold; with top-k, k sets"):
        check_train(top, step, donor=None)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("spread", [0.0, -1.0, torch.inf, torch.nan, True])
def test_a_spread_is_above_0(spread: float, kind: str) -> None:
    with pytest.raises(ValueError, match="a linear router needs a spread above 0, not"):
        attach_experts(build("llama"), replace(TOP, router=kind, router_options={"spread": spread}))


def test_an_earlier_version_refuses_the_words() -> None:
    """What it does not know it names: the format need not rise."""
    with pytest.raises(ValueError, match="unknown mode 'weighed'"):
        Conversion.from_dict({**TOP.to_dict(), "mode": "weighed"})
    with pytest.raises(ValueError, match="unknown router 'softmix'"):
        attach_experts(build("llama"), replace(TOP, router="softmix"))
