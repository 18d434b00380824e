"""Few bits propose, exact rows compute: against slow twins, in every family, from disk."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.routers import CATSRouter, FewBitsRouter
from moe_tools.experts.selectors import Threshold
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import find_ffns
from moe_tools.kernels.few_bits import copy_rows, store_rows
from moe_tools.steps.quantize import quantize
from tests.families import FAMILIES, NEURONS, build, logits, same

every_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "t5-gated"])
NO_TEXT = torch.empty(0, 8, dtype=torch.long)


def few_bits(size: int = 1, tau: float = 0.0, **options: Any) -> Conversion:
    selector = {"kind": "threshold", "tau": tau}
    return Conversion("donor", size, "few_bits", selector, router_options=options)


def attached(family: str, size: int = 1, **options: Any) -> ExpertFFN:
    torch.manual_seed(0)
    return attach_experts(build(family), few_bits(size, **options))[0]


def router_of(ffn: ExpertFFN) -> FewBitsRouter:
    assert isinstance(ffn.router, FewBitsRouter)
    return ffn.router


def inputs(ffn: ExpertFFN, tokens: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(tokens, ffn.projections.size[1])


def proposed(ffn: ExpertFFN, x_TD: Tensor, copied: Any) -> Tensor:
    """|act(g~) u~| ||w_down||, neuron by neuron, token by token."""
    weights = ffn.weights()
    out = torch.empty(len(x_TD), NEURONS)
    for f in range(NEURONS):
        rows = [
            copied(rows_FD[f : f + 1]).values_FD()[0] @ x_TD.T + (0 if bias is None else bias[f])
            for rows_FD, bias, _ in weights.inputs
        ]
        h_T = ffn.projections.act(rows[0]) * (rows[1] if len(rows) > 1 else 1)
        out[:, f] = h_T.abs() * weights.down_FD[f].norm()
    return out


@some_families
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scores_are_what_few_bits_say_of_each_neuron(family: str, bits: int) -> None:
    ffn = attached(family, bits=bits)
    x_TD = inputs(ffn)
    expected = proposed(ffn, x_TD, lambda row: copy_rows(row, bits))
    assert torch.allclose(ffn.router(x_TD), expected, rtol=1e-4, atol=1e-6)


@some_families
@pytest.mark.parametrize(("of", "bits"), [(8, 4), (4, 2)])
def test_planes_propose_with_the_high_bits_of_what_is_stored(
    family: str, of: int, bits: int
) -> None:
    model = build(family)
    quantize(model, of, NO_TEXT)
    ffn = attach_experts(model, few_bits(bits=bits, of=of))[0]
    x_TD = inputs(ffn)
    expected = proposed(ffn, x_TD, lambda row: store_rows(row, of).high_bits(bits))
    assert torch.allclose(ffn.router(x_TD), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", [8, 4])
def test_planes_of_weights_that_are_stored_otherwise_are_refused(of: int) -> None:
    with pytest.raises(
        ValueError, match=rf"not stored in {of} bits.*put `quantize: {{bits: {of}}}"
    ):
        attached("llama", bits=2, of=of)


@every_family
def test_every_neuron_on_is_the_dense_model(family: str) -> None:
    model = build(family)
    dense = logits(model)
    attach_experts(model, few_bits(tau=-1.0))
    assert same(family, logits(model), dense)


@every_family
def test_a_folder_decides_as_before(family: str, tmp_path: Path) -> None:
    model = build(family)
    ffns = attach_experts(model, few_bits(bits=3))
    for ffn in ffns:
        router_of(ffn).moment_D.copy_(torch.rand(ffn.projections.size[1]))
        ffn.selector = Threshold(0.01)
    before = logits(model)
    save(model, tmp_path / "converted")
    again = load(str(tmp_path / "converted"), dtype=torch.float32)
    assert torch.equal(logits(again), before)
    masks = [ffn.route(inputs(ffn)).mask_TE for ffn in expert_ffns(again)]
    assert any(mask.any() and not mask.all() for mask in masks)


def test_experts_score_the_root_of_their_energy() -> None:
    single, grouped = attached("llama"), attached("llama", size=8)
    x_TD = inputs(single)
    expected = single.router(x_TD).unflatten(-1, (-1, 8)).square().sum(-1).sqrt()
    assert torch.allclose(grouped.router(x_TD), expected)


def test_copies_follow_the_weights() -> None:
    """Changed in place, replaced, trained: what proposes is never a copy of other weights."""
    ffn = attached("mistral").eval()
    x_TD = inputs(ffn)
    first = ffn.router(x_TD)
    assert torch.equal(ffn.router(x_TD), first)
    up = ffn.projections.up
    with torch.no_grad():
        up.get_parameter("weight").mul_(2)
    assert torch.allclose(ffn.router(x_TD), 2 * first, rtol=1e-2)
    up.weight = torch.nn.Parameter(up.get_parameter("weight") / 2)
    assert torch.allclose(ffn.router(x_TD), first)
    ffn.train()
    up.weight.data.mul_(2)  # as DeepSpeed writes: no version counts it
    assert torch.allclose(ffn.router(x_TD), 2 * first, rtol=1e-2)
    up.weight.data.mul_(2)
    assert torch.allclose(ffn.router(x_TD), 4 * first, rtol=1e-2)
    ffn.eval()
    assert torch.allclose(ffn.router(x_TD), 4 * first, rtol=1e-2)


def test_norms_stay_those_from_before() -> None:
    ffn = attached("llama").eval()
    x_TD = inputs(ffn)
    before = ffn.router(x_TD)
    with torch.no_grad():
        ffn.down.get_parameter("weight").zero_()
    assert torch.equal(ffn.router(x_TD), before)


def test_a_copy_of_the_model_makes_its_own_copies() -> None:
    ffn = attached("mistral").eval()
    x_TD = inputs(ffn)
    before = ffn.router(x_TD)
    other = copy.deepcopy(ffn)
    with torch.no_grad():
        other.projections.up.get_parameter("weight").mul_(2)
    assert torch.equal(ffn.router(x_TD), before)
    assert torch.allclose(other.router(x_TD), 2 * before)
    assert torch.equal(pickle.loads(pickle.dumps(ffn)).router(x_TD), before)


def test_inputs_can_be_rounded_and_left_out() -> None:
    ffn = attached("llama", bits=8)
    x_TD = inputs(ffn)
    whole = ffn.router(x_TD)
    rounded = attached("llama", bits=8, x_bits=8).router(x_TD)
    assert torch.allclose(rounded, whole, rtol=0.1, atol=1e-3) and not torch.equal(rounded, whole)
    kept = x_TD.abs().topk(8, dim=-1).indices
    half = torch.zeros_like(x_TD).scatter(-1, kept, x_TD.gather(-1, kept))
    assert torch.equal(attached("llama", bits=8, inputs=0.5).router(x_TD), ffn.router(half))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 5}, "bits is 5, but must be 2, 3, 4 or 8"),
        ({"of": 3}, "of is 3, but weights are stored in 8 or 4 bits, or null"),
        ({"bits": 4, "of": 4}, "the high 4 of 4 bits save nothing"),
        ({"x_bits": 4}, "x_bits is 4, but must be 8 or null"),
        ({"inputs": 0.0}, "inputs is 0.0, but must be a share"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        attached("llama", **options)


def test_no_gradient_reaches_the_copies() -> None:
    ffn = attached("llama")
    x_TD = inputs(ffn).requires_grad_()
    assert not ffn.router(x_TD).requires_grad
    ffn(x_TD).sum().backward()
    assert x_TD.grad is not None


def test_what_scoring_takes() -> None:
    width = attached("llama").projections.size[1]
    rows = 2 * NEURONS * width
    cost = router_of(attached("llama", bits=4)).scoring()
    assert (cost.bits, cost.few_bit_ops) == (4.5 * rows + 16 * NEURONS, 2 * rows)
    assert (cost.flops, cost.known_bits, cost.known_flops) == (0, 0, 0)
    assert router_of(attached("llama", inputs=0.5)).scoring().bits == 2.25 * rows + 16 * NEURONS
    model = build("llama")
    quantize(model, 8, NO_TEXT)
    planes = router_of(attach_experts(model, few_bits(bits=4, of=8))[0]).scoring(8)
    assert planes.known_bits == 4.5 * 2 * width
    plain = router_of(attached("gpt2")).scoring()
    assert plain.few_bit_ops == 2 * NEURONS * attached("gpt2").projections.size[1]


# --- cats


def cats(family: str, size: int = 1) -> ExpertFFN:
    conversion = Conversion("donor", size, "cats", {"kind": "threshold", "tau": 0.1})
    return attach_experts(build(family), conversion)[0]


@some_families
def test_cats_scores_the_gate_alone(family: str) -> None:
    ffn = cats(family)
    x_TD, weights = inputs(ffn), ffn.weights()
    rows_FD, bias_F, _ = weights.inputs[0]
    z_TF = torch.nn.functional.linear(x_TD, rows_FD, bias_F)
    assert torch.allclose(ffn.router(x_TD), ffn.projections.act(z_TF).abs(), atol=1e-6)


@some_families
def test_cats_knows_the_gate_of_what_it_chooses(family: str) -> None:
    ffn = cats(family)
    router = ffn.router
    assert isinstance(router, CATSRouter)
    width = ffn.projections.size[1]
    cost = router.scoring(8)
    assert (cost.flops, cost.bits) == (2 * NEURONS * width, 8.5 * NEURONS * width)
    assert (cost.known_flops, cost.known_bits) == (2 * width, 8.5 * width)


def test_cats_refuses_a_gate_that_is_joined() -> None:
    model = build("llama")
    swap_activations(model, Conversion("donor", activation={"kind": "drelu"}))
    with pytest.raises(ValueError, match=r"DReLU joins gate and up.*use router few_bits"):
        attach_experts(model, Conversion("donor", 1, "cats", {"kind": "threshold", "tau": 0.1}))


def test_the_dense_model_is_a_setting_away() -> None:
    model = build("llama")
    dense = logits(model)
    for ffn in attach_experts(model, few_bits()):
        ffn.selector = Threshold(1e9)
    assert not torch.allclose(logits(model), dense)
    with every_expert_on(model):
        assert torch.equal(logits(model), dense)
    assert not find_or_none(model)


def find_or_none(model: Any) -> bool:
    """Whether dense FFNs are left."""
    try:
        return bool(find_ffns(model))
    except ValueError:
        return False
