"""The converted FFN: modes, what an expert that is off contributes, numerics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.hosts.ffn import find_ffns
from tests.families import (
    ALWAYS,
    EXPERTS,
    NEURONS,
    SIZES,
    THRESHOLD,
    build,
    every_size,
    logits,
    model_inputs,
    of_size,
    per_neuron,
    randomize,
    routed,
)

MEAN = replace(THRESHOLD, when_off="mean")
every_kind = pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5-gated", "mixtral"])
every_mode = pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
every_off = pytest.mark.parametrize("conversion", [THRESHOLD, MEAN], ids=["zero", "mean"])


def make(family: str = "llama", conversion: Conversion = THRESHOLD) -> ExpertFFN:
    """One FFN with a random router and random off_F."""
    model, ffns = routed(build(family), conversion)
    randomize(model)
    if ffns[0].off_F is not None:
        ffns[0].off_F.normal_()
    return ffns[0]


def gradients(ffn: ExpertFFN, x_TD: Tensor) -> dict[str, Tensor]:
    """After a backward pass, by name; only what got one."""
    ffn.zero_grad()
    ffn(x_TD).square().sum().backward()
    return {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}


@every_kind
@every_size
@torch.no_grad()
def test_off_experts_contribute_their_mean(family: str, size: int) -> None:
    ffn = make(family, of_size(size, MEAN))
    x_TD = torch.randn(3, 7, 16)
    h_TF, routing = ffn.hidden(x_TD), ffn.route(x_TD)
    on_TF = per_neuron(routing.mask_TE, size)
    assert 0 < on_TF.float().mean() < 1
    switched_TF = ffn.switch(h_TF, routing)
    assert torch.equal(switched_TF, torch.where(on_TF, h_TF, ffn.off_F))
    assert torch.equal(ffn(x_TD), ffn.projections.project_TD(switched_TF))


@every_kind
@every_size
@torch.no_grad()
def test_soft_scores_lead_from_the_mean_to_the_activation(family: str, size: int) -> None:
    ffn = make(family, replace(MEAN, mode="soft", expert_size=size))
    x_TD = torch.randn(3, 7, 16)
    h_TF, routing = ffn.hidden(x_TD), ffn.route(x_TD)
    score_TF = per_neuron(routing.scores_TE, size)
    expected = score_TF * h_TF + (1 - score_TF) * ffn.off_F
    torch.testing.assert_close(ffn.switch(h_TF, routing), expected, rtol=1e-5, atol=1e-6)


@every_mode
@torch.no_grad()
def test_all_experts_off_leave_the_mean_alone(mode: str) -> None:
    ffn = make("llama", replace(MEAN, mode=mode))
    ffn.router.weight.zero_()
    ffn.router.bias.fill_(-200.0)  # a score of exactly 0
    constant_TD = ffn.projections.project_TD(ffn.off_F.expand(4, NEURONS))
    assert torch.equal(ffn(torch.randn(4, 16)), constant_TD)


@every_off
@every_mode
@torch.no_grad()
def test_all_experts_on_are_dense_in_every_mode(mode: str, conversion: Conversion) -> None:
    donor = build("llama")
    model, ffns = routed(donor, replace(conversion, mode=mode))
    for ffn in ffns:
        assert (ffn.router.bias == ALWAYS).all()
        if ffn.off_F is not None:
            ffn.off_F.normal_()
    assert torch.equal(logits(model), logits(donor))


CONSTANTS = replace(THRESHOLD, constants=True)


def make_constants(family: str = "llama", conversion: Conversion = CONSTANTS) -> ExpertFFN:
    """The same with random constants."""
    ffn = make(family, conversion)
    for constant in (ffn.bias_D, ffn.off_RD):
        if constant is not None:
            constant.normal_()
    return ffn


@every_kind
@every_mode
@every_size
@torch.no_grad()
def test_constants_are_added_for_what_is_off(family: str, mode: str, size: int) -> None:
    changes = {"mode": mode, "shared_experts": 1, "expert_size": size}
    ffn = make_constants(family, replace(CONSTANTS, **changes))
    x_TD = torch.randn(3, 7, 16)
    y_TD, routing = ffn(x_TD), ffn.route(x_TD)
    on_TR = (routing.scores_TE if mode == "soft" else routing.mask_TE.float())[..., 1:]
    assert 0 < on_TR.mean() < 1
    expected = y_TD - ffn.bias_D
    for expert, constant_D in enumerate(ffn.off_RD):
        expected = expected - (1 - on_TR[..., expert, None]) * constant_D
    ffn.bias_D = None
    torch.testing.assert_close(ffn(x_TD), expected, rtol=1e-5, atol=1e-5)


def test_single_neurons_have_a_bias_alone() -> None:
    ffn = make_constants(conversion=replace(CONSTANTS, expert_size=1))
    assert ffn.off_RD is None and ffn.bias_D.shape == (16,)
    x_TD = torch.randn(9, 16)
    with_bias = ffn(x_TD)
    ffn.bias_D.zero_()
    assert (with_bias - ffn(x_TD)).abs().max() > 0.1


def test_constants_of_zero_change_no_bit() -> None:
    model, ffns = routed(build("llama"), CONSTANTS)
    randomize(model)
    expected = logits(model)
    for ffn in ffns:
        ffn.bias_D = ffn.off_RD = None
    assert torch.equal(logits(model), expected)


def test_routers_learn_through_constants_as_through_neurons() -> None:
    """d y / d G_e = E_e(x) - what the expert adds when it is off."""
    ffn = make_constants(conversion=replace(CONSTANTS, mode="straight"))
    x_TD, direction_TD = torch.randn(9, 16), torch.randn(9, 16)

    def slopes_TE() -> Tensor:
        routing = ffn.route(x_TD)
        scores_TE = routing.scores_TE.detach().requires_grad_()
        routing = routing._replace(scores_TE=scores_TE)
        y_TD = ffn.projections.project_TD(ffn.switch(ffn.hidden(x_TD), routing))
        y_TD = ffn.complete_TD(y_TD, routing)
        return torch.autograd.grad((y_TD * direction_TD).sum(), scores_TE)[0]

    with_constants_TE, constants_RD = slopes_TE(), ffn.off_RD
    ffn.bias_D = ffn.off_RD = None
    difference_TE = slopes_TE() - with_constants_TE
    torch.testing.assert_close(difference_TE, direction_TD @ constants_RD.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conversion", [THRESHOLD, MEAN, CONSTANTS], ids=["zero", "mean", "const"])
def test_straight_is_hard_forwards(conversion: Conversion) -> None:
    ffn = make("llama", conversion)
    x_TD = torch.randn(9, 16)
    with torch.no_grad():
        hard_TD = ffn(x_TD)
        ffn.mode = "straight"
        assert torch.equal(ffn(x_TD), hard_TD)
        ffn.mode = "soft"
        assert not torch.equal(ffn(x_TD), hard_TD)


@every_off
def test_straight_trains_the_host_as_hard_does_and_every_router_too(conversion: Conversion) -> None:
    ffn = make("llama", conversion)
    x_TD = torch.randn(9, 16)
    hard = gradients(ffn, x_TD)
    ffn.mode = "straight"
    straight = gradients(ffn, x_TD)
    assert straight.keys() - hard.keys() == {"router.weight", "router.bias"}
    for name, gradient in hard.items():
        torch.testing.assert_close(straight[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    assert straight["router.bias"].count_nonzero() == EXPERTS  # experts that are off learn too
    assert straight["router.weight"].count_nonzero() > 0


@every_size
@torch.no_grad()
def test_the_straight_gradient_of_a_score_is_the_experts_output(size: int) -> None:
    """d y / d G_e = E_e(x), for an expert that is on as for one that is off."""
    ffn = make("llama", replace(THRESHOLD, mode="straight", expert_size=size))
    x_TD, direction_TD = torch.randn(3, 16), torch.randn(3, 16)
    h_TF = ffn.hidden(x_TD)
    routing = ffn.route(x_TD)
    with torch.enable_grad():
        scores_TE = routing.scores_TE.detach().requires_grad_()
        y_TD = ffn.projections.project_TD(ffn.switch(h_TF, routing._replace(scores_TE=scores_TE)))
        (gradient_TE,) = torch.autograd.grad((y_TD * direction_TD).sum(), scores_TE)
    parts = zip(h_TF.split(SIZES[size], -1), ffn.weights().down_FD.split(SIZES[size]), strict=True)
    outputs_TED = torch.stack([h_TN @ down_ND for h_TN, down_ND in parts], 1)
    expected_TE = (outputs_TED * direction_TD[:, None]).sum(-1)
    torch.testing.assert_close(gradient_TE, expected_TE, rtol=1e-5, atol=1e-6)


@every_kind
def test_a_batch_is_its_tokens_one_by_one(family: str) -> None:
    ffn = make(family)
    x_TD = torch.randn(2, 5, 16)
    with torch.no_grad():
        whole, flat = ffn(x_TD), ffn(x_TD.flatten(0, 1))
        single = torch.stack([ffn(x_D) for x_D in x_TD.flatten(0, 1)])
    assert torch.equal(whole.flatten(0, 1), flat)
    torch.testing.assert_close(single, flat, rtol=1e-5, atol=1e-6)
    assert ffn(torch.randn(0, 16)).shape == (0, 16)


@every_kind
def test_autocast_is_exact_too(family: str) -> None:
    donor = build(family)
    model, _ = routed(donor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(donor))


def test_a_t5_in_float16_keeps_its_wide_projection() -> None:
    donor = build("t5-gated").half()
    for ffn in find_ffns(donor):
        ffn.down.float()  # as `from_pretrained` does
    model, _ = routed(donor)
    assert torch.equal(logits(model), logits(donor))


@every_kind
def test_children_keep_the_host_names(family: str) -> None:
    donor = build(family)
    parts = {ffn.name: ffn.layout.parts() for ffn in find_ffns(donor)}
    _, ffns = routed(donor)
    for ffn in ffns:
        names = {name for name, _ in ffn.named_children()} - {"router"}
        assert names == {
            path.replace("output.", "output_").split(".")[-1] for path in parts[ffn.name]
        }


def test_the_host_parts_are_moved_not_copied() -> None:
    model = build("llama")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    attach_experts(model, THRESHOLD)
    after = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert before.items() <= after.items()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_stays_in_its_mode(training: bool) -> None:
    model = build("llama").train(training)
    attach_experts(model, THRESHOLD)
    assert {module.training for module in model.modules()} == {training}


def test_a_dense_model_has_no_expert_ffns() -> None:
    assert expert_ffns(build("llama")) == []


def test_the_selector_decides_at_every_call() -> None:
    model, ffns = routed(build("llama"), replace(THRESHOLD, selector={"kind": "topk", "k": 2}))
    randomize(model)
    for ffn in ffns:
        assert (ffn.route(torch.randn(5, 16)).mask_TE.sum(-1) == 2).all()
    sparse = logits(model)
    for ffn in ffns:
        ffn.selector = replace(ffn.selector, k=EXPERTS)
    assert not torch.equal(logits(model), sparse)


def test_hard_mode_leaves_the_router_without_a_gradient() -> None:
    model, ffns = routed(build("llama"))
    randomize(model)
    model(**model_inputs(model)).logits.sum().backward()
    assert all(ffn.router.weight.grad is None for ffn in ffns)
    assert all(ffn.weights().up_FD.grad is not None for ffn in ffns)
    model.zero_grad()
    set_mode(model, "straight")
    model(**model_inputs(model)).logits.sum().backward()
    assert all(ffn.router.weight.grad.count_nonzero() > 0 for ffn in ffns)


@every_mode
@every_off
def test_with_every_expert_on_a_model_is_its_host(mode: str, conversion: Conversion) -> None:
    donor = build("llama")
    model, ffns = routed(donor, replace(conversion, mode=mode, shared_experts=1))
    randomize(model)
    before = logits(model)
    selectors = [ffn.selector for ffn in ffns]
    assert not torch.equal(before, logits(donor))
    with every_expert_on(model):
        assert torch.equal(logits(model), logits(donor))
    assert torch.equal(logits(model), before)
    assert [ffn.selector for ffn in ffns] == selectors and {ffn.mode for ffn in ffns} == {mode}
    with pytest.raises(ArithmeticError), every_expert_on(model):
        raise ArithmeticError
    assert torch.equal(logits(model), before)


@every_mode
@every_kind
def test_shared_experts_weigh_one_in_every_mode(family: str, mode: str) -> None:
    ffn = make(family, replace(THRESHOLD, mode=mode, shared_experts=2))
    with torch.no_grad():
        ffn.router.weight.zero_()
        ffn.router.bias.fill_(-200.0)  # a score of exactly 0
        x_TD = torch.randn(3, 5, 16)
        alone_TF = ffn.hidden(x_TD)
        alone_TF[..., 16:] = 0
        assert torch.equal(ffn(x_TD), ffn.projections.project_TD(alone_TF))


@every_off
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_off_stays_off_whatever_it_is(conversion: Conversion, value: float) -> None:
    """A product with a mask of zeros would be NaN; kernels skip the neuron, and so does eager."""
    ffn = make(conversion=conversion)
    x_TD = torch.randn(5, 16)
    h_TF, routing = ffn.hidden(x_TD).detach().requires_grad_(), ffn.route(x_TD)
    off_TF = ~per_neuron(routing.mask_TE)
    assert off_TF.any() and not off_TF.all()
    switched_TF = ffn.switch(torch.where(off_TF, value, h_TF), routing)
    assert torch.equal(switched_TF, ffn.switch(h_TF, routing))
    (grad_TF,) = torch.autograd.grad(switched_TF.sum(), h_TF)
    assert torch.equal(grad_TF, (~off_TF).float())
