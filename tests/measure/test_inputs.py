"""Counted inputs beside what the linears are really given, one number at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.measure.inputs import GROUPS, InputCount, count_inputs
from moe_tools.recipe import Threshold
from moe_tools.thresholds.sites import ffn_sites
from tests.families import THRESHOLD, build, logits
from tests.steps.test_threshold import given_to, text

FAMILIES = ("llama", "gpt2", "phi3", "mixtral", "gemma3")


def converted(family: str, *, routed: bool, **fields: Any) -> PreTrainedModel:
    model = build(family)
    if routed:
        attach_experts(model, THRESHOLD)
        for ffn in expert_ffns(model):
            nn.init.normal_(ffn.router.weight, std=0.5)
    given_to(replace(Threshold(0.4), **fields), model)
    return model


def seen_of(model: PreTrainedModel, ids_BT: Tensor, **mask: Tensor) -> dict[str, Tensor]:
    """Site of an FFN -> what its first linear is given, after the threshold."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for site in ffn_sites(model):

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
            seen.setdefault(name, []).append(args[0].flatten(0, -2))

        handles.append(site.calls[0][0].register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=ids_BT, **mask)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def count(model: PreTrainedModel, ids_BT: Tensor, **mask: Tensor) -> dict[str, InputCount]:
    with count_inputs(model) as counts, torch.no_grad():
        model(input_ids=ids_BT, **mask)
    return {one.site: one for one in counts}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_reads_what_is_not_0(family: str) -> None:
    model = converted(family, routed=False)
    ids_BT = text(3, 11)
    counted, expected = count(model, ids_BT), logits(model)
    for name, x_TD in seen_of(model, ids_BT).items():
        one, neurons = counted[name], 48
        matrices = 1 if name.endswith("hidden") or family == "gpt2" else 2
        other = 16 if name.endswith("hidden") else neurons
        assert one.tokens == len(x_TD) and one.width == x_TD.shape[1]
        assert one.kept == int((x_TD != 0).sum()) < x_TD.numel()
        assert one.read == one.kept * matrices * other
        assert one.read_without == x_TD.numel() * matrices * other
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_a_routed_one_reads_what_is_not_0_for_the_neurons_that_are_on(family: str) -> None:
    """The host itself computes h of a masked one: its routing comes after gate and up."""
    model = converted(family, routed=True)
    ids_BT = text(3, 11)
    counted, seen = count(model, ids_BT), seen_of(model, ids_BT)
    with record_routing(model) as records, torch.no_grad():
        model(input_ids=ids_BT)
    for routing in records:
        on_T = routing.division.spread_TF(routing.mask_TE.flatten(0, -2)).sum(-1)
        x_TD, h_TF = seen[f"{routing.ffn}:input"], seen[f"{routing.ffn}:hidden"]
        entered, hidden = counted[f"{routing.ffn}:input"], counted[f"{routing.ffn}:hidden"]
        matrices = 1 if family == "gpt2" else 2
        assert entered.read == matrices * int(((x_TD != 0).sum(-1) * on_T).sum())
        assert entered.read_without == matrices * 16 * int(on_T.sum())
        assert hidden.read == 16 * int((h_TF != 0).sum()) < hidden.read_without
        assert hidden.read_without == 16 * int(on_T.sum()) < 16 * h_TF.numel()


@pytest.mark.parametrize("size", GROUPS)
def test_a_union_is_what_one_of_some_tokens_far_apart_keeps(size: int) -> None:
    model = converted("llama", routed=False)
    ids_BT = text(2, 33)
    counted = count(model, ids_BT)
    for name, x_TD in seen_of(model, ids_BT).items():
        groups = len(x_TD) // size
        kept = [(x_TD[first : groups * size : groups] != 0).any(0).sum() for first in range(groups)]
        union = counted[name].union(size)
        assert union == pytest.approx(float(sum(kept)) / (groups * x_TD.shape[1]))
        assert union > 1 - counted[name].sparsity
    assert count(model, ids_BT[:1, :3])[name].union(4) == 1


@pytest.mark.parametrize("routed", [False, True])
def test_padding_is_not_counted(routed: bool) -> None:
    model = converted("llama", routed=routed, where="all")
    ids_BT = text(2, 9)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    padded = count(model, ids_BT, attention_mask=mask_BT)
    alone, short = count(model, ids_BT[:1]), count(model, ids_BT[1:, :4])
    for name, one in padded.items():
        assert one.tokens == 13
        # sums of another order may fall on the other side of a threshold
        assert one.read == pytest.approx(alone[name].read + short[name].read, rel=0.02)


def test_a_rotated_input_is_counted_as_it_is_after_the_rotation() -> None:
    model = converted("llama", routed=False, rotate=True, sites="input")
    for one in count(model, text()).values():
        assert one.sparsity == pytest.approx(0.4, abs=0.05)


def test_without_thresholds_nothing_is_counted() -> None:
    with count_inputs(build("llama")) as counts:
        assert counts == []
