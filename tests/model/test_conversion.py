"""The `moe_tools` block of `config.json`, and attaching experts from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_tools.model.conversion import (
    FORMAT,
    Conversion,
    attach_experts,
    read_conversion,
    set_mode,
    write_conversion,
)
from moe_tools.model.experts import expert_ffns
from tests.families import THRESHOLD, build, logits, randomize, routed

BLOCK = THRESHOLD.to_dict()


@pytest.mark.parametrize(
    "conversion",
    [
        THRESHOLD,
        Conversion("donor", 8),
        Conversion("hub/id", 1, "sigmoid", {"kind": "topk", "k": 2}, "straight", "mean"),
    ],
    ids=["threshold", "dense", "topk"],
)
def test_the_block_gives_the_conversion_back(conversion: Conversion) -> None:
    assert Conversion.from_dict(conversion.to_dict()) == conversion


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (BLOCK | {"modee": "hard"}, "unknown key in the moe_tools block of config.json 'modee'; "
         "did you mean 'mode'"),
        (BLOCK | {"format": FORMAT + 1}, "moe_tools format 2; this version reads 1: install"),
        (BLOCK | {"format": 2, "new": 0}, "moe_tools format 2; this version reads 1: install"),
        ({"donor": "donor", "expert_size": 8}, "moe_tools format None; this version reads 1"),
        ({"format": FORMAT}, "the moe_tools block of config.json lacks donor, expert_size"),
        ("yes", "the moe_tools block of config.json is no mapping: 'yes'"),
        (BLOCK | {"mode": "sotf"}, "unknown mode 'sotf'; did you mean 'soft'"),
        (BLOCK | {"mode": None}, "unknown mode 'None'"),
        (BLOCK | {"when_off": "meen"}, "unknown when_off 'meen'; did you mean 'mean'"),
        (BLOCK | {"expert_size": "8"}, "expert_size is a number of neurons, not '8'"),
    ],
    ids=[
        "unknown-key",
        "newer",
        "newer-with-a-new-key",
        "no-format",
        "no-fields",
        "no-mapping",
        "mode",
        "no-mode",
        "when_off",
        "expert_size",
    ],
)  # fmt: skip
def test_a_wrong_block_is_refused(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conversion.from_dict(block)


def test_a_model_nobody_converted_has_no_block() -> None:
    assert read_conversion(build("llama")) is None


def test_attaching_writes_the_block() -> None:
    model, _ = routed(build("llama"))
    assert read_conversion(model) == THRESHOLD


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
def test_setting_the_mode_reaches_every_ffn_and_the_block(mode: str) -> None:
    model, ffns = routed(build("llama"))
    set_mode(model, mode)
    assert {ffn.mode for ffn in ffns} == {mode}
    assert read_conversion(model) == replace(THRESHOLD, mode=mode)


def test_an_unknown_mode_changes_nothing() -> None:
    model, ffns = routed(build("llama"))
    with pytest.raises(ValueError, match="unknown mode 'sft'; did you mean 'soft'"):
        set_mode(model, "sft")
    assert {ffn.mode for ffn in ffns} == {"hard"}
    assert read_conversion(model) == THRESHOLD


def test_a_dense_model_has_no_mode() -> None:
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM is dense: it has no routing mode"):
        set_mode(build("llama"), "soft")


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (replace(THRESHOLD, expert_size=7), "^model.layers.0.mlp has 48 neurons, which experts of "
         "7 do not divide; nearest sizes: 6, 8$"),
        (replace(THRESHOLD, expert_size=0), "^model.layers.0.mlp has 48 neurons"),
        (replace(THRESHOLD, router="sigmod"), "^unknown router 'sigmod'; did you mean 'sigmoid'"),
        (replace(THRESHOLD, router=None), "^a routed model needs a router and a selector"),
        (replace(THRESHOLD, selector=None), "^a routed model needs a router and a selector"),
        (replace(THRESHOLD, selector={"kind": "topkk"}), "^unknown selector 'topkk'; did you mean"),
    ],
    ids=["size", "zero-size", "router", "no-router", "no-selector", "selector"],
)  # fmt: skip
def test_what_cannot_be_attached_leaves_the_model_dense(
    conversion: Conversion, message: str
) -> None:
    model = build("llama")
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        attach_experts(model, conversion)
    assert not expert_ffns(model)
    assert read_conversion(model) is None
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("expert_size", [1, 2, 48])
def test_experts_from_one_neuron_to_all_of_them(expert_size: int) -> None:
    donor = build("llama")
    model, ffns = routed(donor, replace(THRESHOLD, expert_size=expert_size))
    assert {ffn.num_experts for ffn in ffns} == {48 // expert_size}
    assert torch.equal(logits(model), logits(donor))
    randomize(model)
    assert not torch.equal(logits(model), logits(donor))


def test_a_split_model_keeps_its_block_until_experts_are_attached() -> None:
    model = build("llama")
    write_conversion(model, Conversion("donor", 8))
    attach_experts(model, THRESHOLD)
    assert read_conversion(model) == THRESHOLD
