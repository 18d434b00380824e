"""Routers: each beside its formula, in fp32 under any dtype, and what it learns."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.division import Division
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import (
    ROUTERS,
    BottleneckRouter,
    LearnedRouter,
    MLPRouter,
    NormRouter,
    RepresentativeRouter,
    SigmoidRouter,
    build_router,
)
from moe_tools.hosts.ffn import FFN, find_ffns
from tests.families import NEURONS, SIZES, UNEVEN, build, force_on, logits

SHARED = 1
STARTS = (10, 20, 30, 39)
"""First neurons of the experts that are routed, of sizes 10, 10, 9 and 9."""
SELECTOR = {"kind": "topk", "share": 0.5}
FAMILIES = ["llama", "phi3", "gpt2", "opt", "t5-relu", "t5-gated"]
every_kind = pytest.mark.parametrize("kind", ROUTERS)
every_ffn = pytest.mark.parametrize("family", FAMILIES)


def made(kind: str, family: str = "llama", **options: Any) -> tuple[FFN, ExpertFFN]:
    """A dense FFN, and a copy with such a router: uneven experts, the first one shared."""
    donor = build(family)
    model = copy.deepcopy(donor)
    conversion = Conversion("donor", UNEVEN, kind, SELECTOR, shared_experts=SHARED)
    ffn = attach_experts(model, replace(conversion, router_options=options))[0]
    return find_ffns(donor)[0], ffn


def shaken(kind: str, family: str = "llama", **options: Any) -> tuple[FFN, ExpertFFN]:
    """With random numbers where the router starts from plain ones."""
    dense, ffn = made(kind, family, **options)
    with torch.no_grad():
        for parameter in ffn.router.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if isinstance(ffn.router, NormRouter):
            ffn.router.scale.fill_(2.5)
        if isinstance(ffn.router, RepresentativeRouter):
            ffn.router.represent(torch.tensor([13, 28, 31, 47]))
    return dense, ffn


def slices() -> list[slice]:
    """The neurons of each routed expert."""
    ends = (*STARTS[1:], NEURONS)
    return [slice(start, end) for start, end in zip(STARTS, ends, strict=True)]


def deciding(dense: FFN) -> tuple[Tensor, Tensor | None]:
    """The rows and biases that decide whether a neuron fires."""
    weights = dense.weights()
    if weights.gate_FD is None:
        return weights.up_FD, weights.up_F
    return weights.gate_FD, weights.gate_F


def hidden(dense: FFN, x_TD: Tensor) -> Tensor:
    """h_TF, row by row from the host's own weights."""
    weights = dense.weights()
    rows_FD, bias_F = deciding(dense)
    act_TF = dense.act(x_TD @ rows_FD.T + (0 if bias_F is None else bias_F))
    if weights.gate_FD is None:
        return act_TF
    return act_TF * (x_TD @ weights.up_FD.T + (0 if weights.up_F is None else weights.up_F))


# --- formulas


@torch.no_grad()
def test_sigmoid_scores_each_expert_alone() -> None:
    _, ffn = shaken("sigmoid")
    x_TD, router = torch.randn(5, 16), ffn.router
    expected = 1 / (1 + (-(x_TD @ router.weight.T + router.bias)).exp())
    torch.testing.assert_close(router(x_TD), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_sigmoid_router_goes_without_a_bias() -> None:
    _, ffn = shaken("sigmoid", bias=False)
    x_TD, router = torch.randn(5, 16), ffn.router
    assert router.bias is None and router.logit_bias is None
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    torch.testing.assert_close(router(x_TD), torch.sigmoid(x_TD @ router.weight.T))


@torch.no_grad()
def test_softmax_scores_share_one() -> None:
    _, ffn = shaken("softmax")
    x_TD, router = torch.randn(5, 16), ffn.router
    powers_TR = (x_TD @ router.weight.T).exp()
    expected = powers_TR / powers_TR.sum(-1, keepdim=True)
    torch.testing.assert_close(router(x_TD), expected, rtol=1e-6, atol=1e-6)
    assert router.logit_bias is None


def test_a_fresh_sigmoid_router_has_every_expert_on() -> None:
    _, ffn = made("sigmoid")
    scores_TR = ffn.router(torch.randn(2, 5, 16))
    assert scores_TR.shape == (2, 5, 4)
    assert (scores_TR > 0.9).all()


@every_ffn
@torch.no_grad()
def test_mlp_starts_at_the_mean_rows(family: str) -> None:
    dense, ffn = made("mlp", family)
    x_TD = torch.randn(5, 16)
    rows_FD, _ = deciding(dense)
    for expert, neurons in enumerate(slices()):
        mean_D = rows_FD[neurons].mean(0)
        expected = torch.sigmoid(torch.tanh(x_TD @ mean_D / x_TD.norm(dim=1)))
        torch.testing.assert_close(ffn.router(x_TD)[:, expert], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_mlp_by_hand() -> None:
    _, ffn = shaken("mlp")
    x_TD, router = torch.randn(5, 16), ffn.router
    unit_TD = x_TD / x_TD.norm(dim=1, keepdim=True)
    logits_TR = (unit_TD @ router.first.weight.T).tanh() @ router.second.weight.T
    torch.testing.assert_close(router(x_TD), 1 / (1 + (-logits_TR).exp()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router(7 * x_TD), router(x_TD), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_norm_by_hand() -> None:
    _, ffn = shaken("norm", hidden=3)
    x_TD, router = torch.randn(5, 16), ffn.router
    assert router.first.weight.shape == (3, 16)
    before = x_TD @ router.first.weight.T + router.first.bias
    gelu = before * 0.5 * (1 + torch.erf(before / 2**0.5))
    expected = 2.5 * (gelu @ router.second.weight.T + router.second.bias).abs()
    torch.testing.assert_close(router(x_TD), expected, rtol=1e-5, atol=1e-6)


@every_ffn
@torch.no_grad()
def test_similarity_is_the_distance_to_the_mean_row(family: str) -> None:
    dense, ffn = made("similarity", family)
    x_TD = torch.randn(40, 16)
    rows_FD, _ = deciding(dense)
    for expert, neurons in enumerate(slices()):
        expected = -(x_TD - rows_FD[neurons].mean(0)).norm(dim=1)
        torch.testing.assert_close(ffn.router(x_TD)[:, expert], expected, rtol=1e-5, atol=1e-5)


@every_ffn
@torch.no_grad()
def test_mean_gate_is_the_average_neuron(family: str) -> None:
    dense, ffn = made("mean_gate", family)
    x_TD = 5 * torch.randn(9, 16)
    rows_FD, bias_F = deciding(dense)
    scores_TR = ffn.router(x_TD)
    for expert, neurons in enumerate(slices()):
        bias = 0.0 if bias_F is None else bias_F[neurons].mean()
        expected = dense.act(x_TD @ rows_FD[neurons].mean(0) + bias).clamp_min(0)
        torch.testing.assert_close(scores_TR[:, expert], expected, rtol=1e-5, atol=1e-6)
    assert (scores_TR == 0).any() and (scores_TR > 0).any()


@every_ffn
@torch.no_grad()
def test_representative_is_one_neuron_of_each_expert(family: str) -> None:
    dense, ffn = made("representative", family)
    x_TD = torch.randn(9, 16)
    h_TF = hidden(dense, x_TD)
    first_TR = h_TF[:, STARTS].abs()
    torch.testing.assert_close(ffn.router(x_TD), first_TR, rtol=1e-5, atol=1e-6)
    ffn.router.represent(torch.tensor([13, 28, 31, 47]))
    named_TR = h_TF[:, [13, 28, 31, 47]].abs()
    torch.testing.assert_close(ffn.router(x_TD), named_TR, rtol=1e-5, atol=1e-6)


@every_ffn
@torch.no_grad()
def test_oracle_is_the_norm_of_each_expert_run_alone(family: str) -> None:
    dense, ffn = made("oracle", family)
    x_TD = torch.randn(9, 16)
    h_TF, down_FD = hidden(dense, x_TD), dense.weights().down_FD
    for expert, neurons in enumerate(slices()):
        expected = (h_TF[:, neurons] @ down_FD[neurons]).norm(dim=1)
        torch.testing.assert_close(ffn.router(x_TD)[:, expert], expected, rtol=1e-4, atol=1e-5)


# --- what all share


@every_kind
@pytest.mark.parametrize("shape", [(0, 16), (7, 16), (2, 3, 16)], ids=str)
@torch.no_grad()
def test_leading_dimensions_are_those_of_the_input(kind: str, shape: tuple[int, ...]) -> None:
    _, ffn = shaken(kind)
    x_TD = torch.randn(shape)
    scores_TR = ffn.router(x_TD)
    assert scores_TR.shape == (*shape[:-1], len(SIZES[UNEVEN]) - SHARED)
    flat_TR = ffn.router(x_TD.reshape(-1, 16))
    torch.testing.assert_close(scores_TR.reshape(-1, 4), flat_TR, rtol=1e-5, atol=1e-6)


@every_kind
@torch.no_grad()
def test_ratio_scale_scores_are_never_negative(kind: str) -> None:
    _, ffn = shaken(kind)
    scores_TR = ffn.router(torch.randn(50, 16))
    assert bool((scores_TR >= 0).all()) == ffn.router.ratio_scale
    assert ffn.router.ratio_scale == (kind != "similarity")


IN_HOST_DTYPE = ["cats", "few_bits", "oracle", "representative"]
"""Routers that run rows of the FFN."""


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - set(IN_HOST_DTYPE)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_scores_are_float32_under_any_dtype(kind: str, dtype: torch.dtype) -> None:
    _, ffn = shaken(kind)
    x_TD = torch.randn(5, 16).to(dtype)
    expected = ffn.router(x_TD.float())
    assert expected.dtype == torch.float32
    assert torch.equal(ffn.router(x_TD), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(ffn.router(x_TD), expected)
        assert torch.equal(ffn.router(x_TD.float()), expected)


@pytest.mark.parametrize("kind", IN_HOST_DTYPE)
@torch.no_grad()
def test_neurons_run_in_the_dtype_of_the_host(kind: str) -> None:
    _, ffn = shaken(kind)
    x_TD = torch.randn(5, 16).bfloat16()
    expected = ffn.router(x_TD.float())
    scores_TR = ffn.bfloat16().router(x_TD)
    assert scores_TR.dtype == torch.float32
    torch.testing.assert_close(scores_TR, expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kind", ["representative", "oracle"])
def test_routers_of_neurons_read_the_hosts_rows(kind: str) -> None:
    """A change of the FFN changes the scores, a copy reads the copy, and gradients go there."""
    dense, ffn = shaken(kind)
    assert not list(ffn.router.parameters())
    twin = copy.deepcopy(ffn)
    x_TD = torch.randn(5, 16)
    before_TR = ffn.router(x_TD).detach()
    with torch.no_grad():
        ffn.weights().up_FD.mul_(2.0)
        ffn.weights().up_F.mul_(2.0)  # type: ignore[union-attr]
    torch.testing.assert_close(ffn.router(x_TD), 2 * before_TR, rtol=1e-5, atol=1e-6)
    assert torch.equal(twin.router(x_TD), before_TR)
    twin.router(x_TD).sum().backward()
    assert twin.up_proj.weight.grad.count_nonzero() > 0
    assert dense.weights().up_FD.grad is None


@every_kind
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_count_a_multiply_and_an_add_a_weight(kind: str, family: str) -> None:
    width, routed, rows = 16, 4, 2 if family == "llama" else 1
    weights = {
        "sigmoid": width * routed,
        "softmax": width * routed,
        "mlp": width * routed + routed * routed,
        "norm": width * 128 + 128 * routed,
        "similarity": width * routed,
        "mean_gate": width * routed,
        "representative": rows * width * routed,
        "oracle": rows * width * NEURONS,
        "low_rank": width * 128 + 128 * routed,
        "bottleneck": width * 16 + 16 * routed,
        "int8_gate": width * NEURONS,
        "sign": 2 * NEURONS,  # the sign bits of a row are one word
        "few_bits": rows * width * NEURONS,
        "cats": width * NEURONS,
    }
    router = made(kind, family)[1].router
    scoring = router.scoring()
    assert scoring.flops + scoring.few_bit_ops == 2 * weights[kind]
    assert router.flops() == scoring.flops
    assert (scoring.flops == 0) == (kind in ("int8_gate", "sign", "few_bits"))


@every_kind
@pytest.mark.parametrize("family", ["phi3", "opt"])
def test_a_folder_gives_the_scores_back(kind: str, family: str, tmp_path: Path) -> None:
    model = build(family)
    attach_experts(model, Conversion("donor", UNEVEN, kind, SELECTOR, shared_experts=SHARED))
    with torch.no_grad():
        for ffn in expert_ffns(model):
            for tensor in ffn.router.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.randn_like(tensor))
            if isinstance(ffn.router, RepresentativeRouter):
                ffn.router.represent(torch.tensor([13, 28, 31, 47]))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    x_TD = torch.randn(9, 16)
    for one, other in zip(expert_ffns(model), expert_ffns(loaded), strict=True):
        torch.testing.assert_close(other.router(x_TD), one.router(x_TD), rtol=1e-6, atol=1e-6)
        assert other.router.state_dict().keys() == one.router.state_dict().keys()
        for name, tensor in one.router.state_dict().items():
            assert torch.equal(other.router.state_dict()[name], tensor)


@every_kind
def test_an_option_nobody_knows_is_named(kind: str) -> None:
    ffn = find_ffns(build("llama"))[0]
    importance = Importance(Division(NEURONS, 5), SHARED, ffn.weights().down_FD)
    with pytest.raises(ValueError, match=rf"^router {kind} with {{'hiden': 3}}: .*'hiden'"):
        build_router(kind, {"hiden": 3}, ffn, importance)


def test_a_norm_router_needs_a_unit() -> None:
    with pytest.raises(ValueError, match=r"^a norm router needs hidden >= 1, not 0$"):
        made("norm", hidden=0)


@pytest.mark.parametrize(("width", "rank"), [(16, 16), (576, 48), (640, 48), (4096, 336)])
def test_a_bottleneck_is_a_twelfth_of_the_width(width: int, rank: int) -> None:
    assert BottleneckRouter(width, 8).first.weight.shape == (rank, width)
    assert BottleneckRouter(width, 8, rank=5).second.weight.shape == (8, 5)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2.5}, {"spread": 0.0}])
def test_what_a_bottleneck_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a bottleneck router needs (rank >= 1|a spread above 0)"):
        made("bottleneck", **options)


def test_a_kind_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="unknown router 'mpl'; did you mean 'mlp'"):
        made("mpl")


# --- what they learn


def test_five_kinds_learn() -> None:
    learned = {name for name, kind in ROUTERS.items() if issubclass(kind, LearnedRouter)}
    assert learned == {"sigmoid", "bottleneck", "mlp", "norm", "low_rank"}


@pytest.mark.parametrize("kind", ["sigmoid", "mlp", "norm"])
@torch.no_grad()
def test_the_target_is_what_each_expert_does(kind: str) -> None:
    dense, ffn = made(kind)
    h_TF, down_FD = hidden(dense, torch.randn(5, 16)), dense.weights().down_FD
    target_TR = ffn.router.target_TR(h_TF, ffn.importance())
    for expert, neurons in enumerate(slices()):
        if kind == "norm":
            expected = (h_TF[:, neurons] @ down_FD[neurons]).norm(dim=1)
        else:
            expected = h_TF[:, neurons].abs().sum(1)
        torch.testing.assert_close(target_TR[:, expert], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SigmoidRouter, MLPRouter])
@torch.no_grad()
def test_labels_are_shares_of_the_largest_target(kind: type[LearnedRouter]) -> None:
    router = kind(16, 3)
    x_TD, target_TR = torch.randn(2, 16), torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]])
    score_TR = router(x_TD)
    label_TR = torch.tensor([[0.25, 1.0, 0.5], [0.0, 0.0, 0.0]])
    expected = -(label_TR * score_TR.log() + (1 - label_TR) * (1 - score_TR).log()).mean()
    torch.testing.assert_close(router.loss(x_TD, target_TR), expected, rtol=1e-5, atol=1e-6)


def test_norms_are_learned_in_units_of_their_mean() -> None:
    router = NormRouter(16, 3, hidden=8)
    x_TD, target_TR = torch.randn(5, 16), 1000 * torch.rand(5, 3)
    router.prepare(target_TR)
    assert router.scale.item() == pytest.approx(target_TR.mean().item())
    expected = ((router(x_TD) - target_TR) / target_TR.mean()).square().mean()
    torch.testing.assert_close(router.loss(x_TD, target_TR), expected, rtol=1e-4, atol=1e-6)
    router.prepare(torch.zeros(5, 3))
    assert torch.isfinite(router.loss(x_TD, torch.zeros(5, 3)))


def test_a_shared_expert_scores_one_and_runs() -> None:
    model = build("llama")
    expected = logits(model)
    conversion = Conversion("donor", UNEVEN, "sigmoid", {"kind": "threshold"}, shared_experts=2)
    for ffn in attach_experts(model, conversion):
        with torch.no_grad():
            ffn.router.bias.fill_(-200.0)
        routing = ffn.route(torch.randn(3, 16))
        assert (routing.scores_TE[:, :2] == 1).all() and (routing.scores_TE[:, 2:] == 0).all()
        assert routing.mask_TE.tolist() == [[True, True, False, False, False]] * 3
        assert routing.neurons_on == 3 * 20 and routing.tokens == 3
    assert not torch.equal(logits(model), expected)
    force_on(model)
    assert torch.equal(logits(model), expected)


# --- dtypes


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_cast_model_scores_in_fp32_with_rounded_weights(
    kind: str, dtype: torch.dtype, family: str
) -> None:
    """`model.to(bf16)`, as DeepSpeed does it, rounds what is stored and not what is computed."""
    _, ffn = shaken(kind, family)
    x_TD = torch.randn(7, 16).to(dtype)
    rounded = copy.deepcopy(ffn)
    for tensor in (*rounded.parameters(), *rounded.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    expected_TR = rounded.router(x_TD.float())
    scores_TR = ffn.to(dtype).router(x_TD)
    assert scores_TR.dtype == torch.float32
    # a router that reads the host's rows computes them as the host does, in the host's dtype
    error = 0.1 if ffn.router.reads_rows else 1e-5
    torch.testing.assert_close(scores_TR, expected_TR, rtol=error, atol=error)
    assert torch.isfinite(ffn(x_TD)).all()


@every_kind
@torch.no_grad()
def test_autocast_changes_no_score(kind: str) -> None:
    _, ffn = shaken(kind)
    x_TD = torch.randn(7, 16)
    expected_TR = ffn.router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        scores_TR = ffn.router(x_TD)
    error = 0.1 if ffn.router.reads_rows else 0.0
    torch.testing.assert_close(scores_TR, expected_TR, rtol=error, atol=error)


@pytest.mark.parametrize(
    "kind", [k for k, made in ROUTERS.items() if issubclass(made, LearnedRouter)]
)
def test_a_cast_router_still_learns(kind: str) -> None:
    _, ffn = shaken(kind)
    ffn.to(torch.bfloat16).router(torch.randn(7, 16).bfloat16()).sum().backward()
    for name, parameter in ffn.router.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
