"""Watching routers: every decision in order, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_tools.experts.division import Division
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.routing import record_routing, routing_sparsity
from tests.families import EXPERTS, FAMILIES, build, logits, model_inputs, randomize, routed

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_every_ffn_is_recorded_in_forward_order(family: str) -> None:
    model, ffns = routed(build(family))
    randomize(model)
    expected = logits(model)
    called: list[str] = []
    for ffn in ffns:
        ffn.register_forward_pre_hook(lambda ffn, _: called.append(ffn.name))
    with record_routing(model) as records:
        assert torch.equal(logits(model), expected)
    assert [record.ffn for record in records] == called
    assert sorted(called) == sorted(ffn.name for ffn in ffns)
    assert all(model.get_submodule(record.ffn) in ffns for record in records)
    for record in records:
        assert record.scores_TE.shape == record.mask_TE.shape
        assert record.scores_TE.shape[-1] == EXPERTS
        assert torch.equal(record.mask_TE, record.scores_TE > 0.5)


def test_leading_dimensions_are_those_of_the_input() -> None:
    model, _ = routed(build("llama"))
    with record_routing(model) as records:
        logits(model)
    assert {record.mask_TE.shape for record in records} == {(2, 9, EXPERTS)}


def test_the_experts_of_an_moe_host_record_their_own_tokens() -> None:
    model, ffns = routed(build("mixtral"))
    assert [ffn.name for ffn in ffns[:2]] == [
        "model.layers.0.mlp.experts.0",
        "model.layers.0.mlp.experts.1",
    ]
    with record_routing(model) as records:
        logits(model)
    tokens = sum(len(record.mask_TE) for record in records)
    assert tokens == 2 * 9 * model.config.num_experts_per_tok * model.config.num_hidden_layers


def test_the_list_grows_a_forward_pass_at_a_time() -> None:
    model, ffns = routed(build("llama"))
    with record_routing(model) as records:
        logits(model)
        logits(model)
        assert len(records) == 2 * len(ffns)
        records.clear()
        logits(model)
    logits(model)
    assert len(records) == len(ffns)


def test_recordings_nest() -> None:
    model, ffns = routed(build("llama"))
    with record_routing(model) as outer:
        with record_routing(model) as inner:
            logits(model)
        logits(model)
    assert len(inner) == len(ffns)
    assert len(outer) == 2 * len(ffns)


def test_nothing_stays_behind_after_an_exception() -> None:
    model, ffns = routed(build("llama"))
    hooks = [ffn.register_forward_hook(fail) for ffn in ffns[1:]]
    with pytest.raises(ArithmeticError), record_routing(model) as records:
        logits(model)
    assert len(records) == 2  # the second FFN fails after it routed
    for hook in hooks:
        hook.remove()
    logits(model)
    assert len(records) == 2
    assert not any(ffn.observers for ffn in expert_ffns(model))


def fail(*_: object) -> None:
    raise ArithmeticError


def test_recorded_scores_carry_a_gradient() -> None:
    model, ffns = routed(build("llama"))
    randomize(model)
    with record_routing(model) as records:
        model(**model_inputs(model))
    sum(record.scores_TE.sum() for record in records).backward()
    assert all(ffn.router.weight.grad.count_nonzero() > 0 for ffn in ffns)


@pytest.mark.parametrize(
    "dense", [lambda: build("llama"), nn.Module], ids=["LlamaForCausalLM", "Module"]
)
def test_a_dense_model_has_nothing_to_record(dense: type[nn.Module]) -> None:
    model = dense()
    name = type(model).__name__
    message = f"^{name} has no routed FFN to record: convert it first$"
    with pytest.raises(ValueError, match=message), record_routing(model):
        raise AssertionError("unreachable")


def routing_of(mask: list[list[bool]], neurons: int) -> Routing:
    mask_TE = torch.tensor(mask)
    return Routing("ffn", mask_TE.float(), mask_TE, Division(neurons, mask_TE.shape[-1]))


def test_neurons_are_counted_by_the_size_of_their_expert() -> None:
    routing = routing_of([[True, False, True], [False, True, False]], 8)  # experts of 3, 3 and 2
    assert (routing.tokens, routing.neurons_on) == (2, 3 + 2 + 3)
    batched = routing._replace(mask_TE=routing.mask_TE[:, None])
    assert (batched.tokens, batched.neurons_on) == (2, 8)


def test_sparsity_weighs_an_ffn_by_its_tokens_and_neurons() -> None:
    one = routing_of([[True, False, True], [False, True, False]], 8)
    other = routing_of([[True, True]], 4)
    assert routing_sparsity([one]) == pytest.approx(1 - 8 / 16)
    assert routing_sparsity([one, other]) == pytest.approx(1 - (8 + 4) / (16 + 4))
