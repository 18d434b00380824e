"""Watching FFNs: each kind in forward order, and no trace afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.training.watch import Kind, watch_ffns
from tests.families import FAMILIES, MOE, build, logits, randomize, routed

KINDS: set[Kind] = {"outputs", "hidden", "pre"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def hooks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def model_of(family: str, sparse: bool) -> PreTrainedModel:
    model = build(family)
    if sparse:
        model, _ = routed(model)
        randomize(model)
    return model


@every_family
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_what_is_seen_fits_together(family: str, sparse: bool) -> None:
    model = model_of(family, sparse)
    ffns = expert_ffns(model) or unfused_ffns(model)
    expected = logits(model)
    with watch_ffns(model, KINDS) as seen:
        assert torch.equal(logits(model), expected)
    assert len(seen.hidden) == len(seen.pre) > 0
    if family not in MOE:  # whose experts may see no token, and do not run in the order of modules
        assert [ffn.name for ffn in ffns] == list(seen.outputs)
        for ffn, h_TF in zip(ffns, seen.hidden, strict=True):
            assert torch.equal(ffn.projections.down(h_TF), seen.outputs[ffn.name])
    for pre_TF, h_TF in zip(seen.pre, seen.hidden, strict=True):
        assert pre_TF.shape == h_TF.shape


@every_family
def test_outputs_come_with_the_constants_of_a_refit(family: str) -> None:
    model = model_of(family, sparse=True)
    for ffn in expert_ffns(model):
        ffn.add_constants()
        ffn.bias_D.fill_(7.0)
    with watch_ffns(model, KINDS) as seen:
        logits(model)
    if family not in MOE:
        for ffn, h_TF in zip(expert_ffns(model), seen.hidden, strict=True):
            assert torch.equal(ffn.projections.down(h_TF) + 7.0, seen.outputs[ffn.name])


@pytest.mark.parametrize("kind", sorted(KINDS))
@every_family
def test_only_what_was_asked_is_kept(family: str, kind: Any) -> None:
    model = build(family)
    with watch_ffns(model, {kind}) as seen:
        logits(model)
    kept = {name for name in KINDS if getattr(seen, name)}
    assert kept == {kind}


@every_family
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_no_hook_stays(family: str, sparse: bool) -> None:
    model = model_of(family, sparse)
    if not sparse:
        unfused_ffns(model)  # takes the experts of an MoE host apart
    before = hooks(model)
    with watch_ffns(model, KINDS) as seen:
        assert len(hooks(model)) > len(before)
    assert hooks(model) == before
    with pytest.raises(ArithmeticError), watch_ffns(model, KINDS):
        raise ArithmeticError
    assert hooks(model) == before
    logits(model)
    assert not (seen.outputs or seen.hidden or seen.pre)


def test_asking_for_nothing_needs_no_ffn() -> None:
    with watch_ffns(nn.Linear(2, 2), set()) as seen:
        pass
    assert (seen.outputs, seen.hidden, seen.pre) == ({}, [], [])


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_the_experts_of_a_layer_are_one_output(family: str, sparse: bool) -> None:
    model = model_of(family, sparse)
    expected: dict[str, torch.Tensor] = {}
    find = expert_ffns(model) or unfused_ffns(model)
    hosts = {ffn.name.rpartition(".")[0]: ffn for ffn in find if ".experts." in ffn.name}
    for path in hosts:
        model.get_submodule(path).register_forward_hook(
            lambda _, __, y_TD, path=path: expected.update({path: y_TD})
        )
    with watch_ffns(model, {"outputs"}) as seen:
        logits(model)
    others = {ffn.name for ffn in find if ".experts." not in ffn.name}
    assert seen.outputs.keys() == expected.keys() | others
    assert all(torch.equal(seen.outputs[path], y_TD) for path, y_TD in expected.items())
    assert {y_TD.shape[-2] for y_TD in expected.values()} == {18}  # every token of both rows
