"""The `moe_tools` block of `config.json`, and attaching experts from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import (
    FORMAT,
    Conversion,
    attach_experts,
    read_conversion,
    set_mode,
    set_selectors,
    write_conversion,
)
from moe_tools.experts.experts import Mode, expert_ffns
from moe_tools.experts.selectors import Everything, Threshold, TopK
from moe_tools.hosts.rows import read_rows
from tests.families import THRESHOLD, build, logits, randomize, routed, said

BLOCK = THRESHOLD.to_dict()


@pytest.mark.parametrize(
    "conversion",
    [
        THRESHOLD,
        Conversion("donor", 8),
        Conversion(
            "donor",
            activation={"kind": "fatrelu"},
            activation_of={"model.layers.0.mlp": {"kind": "fatrelu", "theta": 0.5}},
            stock_activation="relu",
        ),
        Conversion("hub/id", 1, "sigmoid", {"kind": "topk", "k": 2}, "straight", "mean"),
        Conversion(
            "donor",
            8,
            "norm",
            {"kind": "dynamic_k", "tau": 0.5},
            shared_experts=2,
            router_options={"hidden": 4},
            selector_of={"model.layers.0.mlp": {"kind": "dynamic_k", "tau": 0.25}},
        ),
    ],
    ids=["threshold", "split", "swapped", "topk", "everything"],
)
def test_the_block_gives_the_conversion_back(conversion: Conversion) -> None:
    assert Conversion.from_dict(conversion.to_dict()) == conversion


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (BLOCK | {"modee": "hard"}, "unknown key in the moe_tools block of config.json 'modee'; "
         "did you mean 'mode'"),
        (BLOCK | {"format": FORMAT + 1}, "moe_tools format 4; this version reads 1 to 3"),
        (BLOCK | {"format": 4, "new": 0}, "moe_tools format 4; this version reads 1 to 3"),
        ({"donor": "donor", "expert_size": 8}, "moe_tools format None; this version reads 1 to 3"),
        ({"format": FORMAT}, "the moe_tools block of config.json lacks donor"),
        ("yes", "the moe_tools block of config.json is no mapping: 'yes'"),
        (BLOCK | {"mode": "sotf"}, "unknown mode 'sotf'; did you mean 'soft'"),
        (BLOCK | {"mode": None}, "unknown mode 'None'"),
        (BLOCK | {"when_off": "meen"}, "unknown when_off 'meen'; did you mean 'mean'"),
        (BLOCK | {"expert_size": "8"}, "expert_size in the .* of config.json is .8., which is no "),
        (BLOCK | {"expert_size": None}, "router sigmoid needs experts: expert_size is missing"),
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
        "no-expert_size",
    ],
)  # fmt: skip
def test_a_wrong_block_is_refused(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conversion.from_dict(block)


def test_a_model_nobody_converted_has_no_block() -> None:
    assert read_conversion(build("llama")) is None


def test_attaching_writes_the_block() -> None:
    model, _ = routed(build("llama"))
    assert said(model) == THRESHOLD


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
def test_setting_the_mode_reaches_every_ffn_and_the_block(mode: str) -> None:
    model, ffns = routed(build("llama"))
    set_mode(model, mode)
    assert {ffn.mode for ffn in ffns} == {mode}
    assert said(model) == replace(THRESHOLD, mode=mode)


def test_an_unknown_mode_changes_nothing() -> None:
    model, ffns = routed(build("llama"))
    with pytest.raises(ValueError, match="unknown mode 'sft'; did you mean 'soft'"):
        set_mode(model, "sft")
    assert {ffn.mode for ffn in ffns} == {"hard"}
    assert said(model) == THRESHOLD


def test_a_dense_model_has_no_mode() -> None:
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM is dense: it has no routing mode"):
        set_mode(build("llama"), "soft")


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (replace(THRESHOLD, expert_size=49), "^model.layers.0.mlp has 48 neurons: experts of 49 "
         "are not possible$"),
        (replace(THRESHOLD, expert_size=0), "^model.layers.0.mlp has 48 neurons: experts of 0 are"),
        (replace(THRESHOLD, router="sigmod"), "^unknown router 'sigmod'; did you mean 'sigmoid'"),
        (replace(THRESHOLD, router=None), "^a routed model needs a router and a selector"),
        (replace(THRESHOLD, selector=None), "^a routed model needs a router and a selector"),
        (replace(THRESHOLD, selector={"kind": "topkk"}), "^unknown selector 'topkk'; did you mean"),
        (replace(THRESHOLD, shared_experts=6), "^model.layers.0.mlp: 6 of 6 experts cannot be sh"),
        (replace(THRESHOLD, shared_experts=-1), "^model.layers.0.mlp: -1 of 6 experts cannot be "),
        (replace(THRESHOLD, shared_experts=4, selector={"kind": "topk", "k": 3}), "^top-k asks for "
         "3 of 2 experts$"),
        (replace(THRESHOLD, router_options={"hidden": 3}), "^router sigmoid with .*'hidden'"),
    ],
    ids=["size", "zero-size", "router", "no-router", "no-selector", "selector", "shared",
         "negative", "too-few", "option"],
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


@pytest.mark.parametrize(
    ("expert_size", "sizes"),
    [
        (1, (1,) * 48),
        (2, (2,) * 24),
        (7, (7, 7, 7, 7, 7, 7, 6)),
        (20, (24, 24)),
        (48, (48,)),
    ],
)
def test_experts_from_one_neuron_to_all_of_them(expert_size: int, sizes: tuple[int, ...]) -> None:
    donor = build("llama")
    model, ffns = routed(donor, replace(THRESHOLD, expert_size=expert_size))
    assert {ffn.division.sizes for ffn in ffns} == {sizes}
    assert {len(ffn.router.bias) for ffn in ffns} == {len(sizes)}
    assert torch.equal(logits(model), logits(donor))
    randomize(model)
    assert not torch.equal(logits(model), logits(donor))


def test_a_split_model_keeps_its_block_until_experts_are_attached() -> None:
    model = build("llama")
    write_conversion(model, Conversion("donor", 8))
    attach_experts(model, THRESHOLD)
    assert said(model) == THRESHOLD


def test_every_ffn_gets_its_own_selector_and_the_block_says_so() -> None:
    model, ffns = routed(build("llama"))
    set_selectors(model, [Threshold(0.25), Threshold(0.75)])
    assert [ffn.selector for ffn in ffns] == [Threshold(0.25), Threshold(0.75)]
    conversion = read_conversion(model)
    assert conversion is not None and conversion.selector == THRESHOLD.selector
    again, made = routed(build("llama"), Conversion.from_dict(conversion.to_dict()))
    assert [ffn.selector for ffn in made] == [Threshold(0.25), Threshold(0.75)]
    assert read_conversion(again) == conversion


def test_an_ffn_that_is_not_named_keeps_the_selector_of_all() -> None:
    named = {"model.layers.1.mlp": {"kind": "topk", "k": 2}}
    _, ffns = routed(build("llama"), replace(THRESHOLD, selector_of=named))
    assert [ffn.selector for ffn in ffns] == [Threshold(0.5), TopK(2)]


def test_settings_of_an_ffn_that_is_not_there_are_an_error() -> None:
    model = build("llama")
    own = {"model.layers.1.mpl": {"kind": "topk", "k": 2}}
    message = r"^unknown FFN in selector_of '.*\.1\.mpl'; did you mean 'model\.layers\.1\.mlp'\?"
    with pytest.raises(ValueError, match=message):
        attach_experts(model, replace(THRESHOLD, selector_of=own))
    assert not expert_ffns(model) and read_conversion(model) is None


def test_as_many_selectors_as_ffns() -> None:
    model, ffns = routed(build("llama"))
    with pytest.raises(ValueError, match="zip"):
        set_selectors(model, [Threshold(0.25)])
    assert {ffn.selector for ffn in ffns} == {Threshold(0.5)}
    assert said(model) == THRESHOLD


def test_a_dense_model_has_no_selector() -> None:
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM is dense: it has no selector to set"):
        set_selectors(build("llama"), [])


# --- the FFNs are the truth


def test_a_selector_that_an_ffn_was_given_is_saved(tmp_path: Path) -> None:
    model, (first, *rest) = routed(build("llama"))
    first.selector = TopK(2)
    save(model, tmp_path / "model")
    again = expert_ffns(load(tmp_path / "model"))
    assert again[0].selector == TopK(2)
    assert [ffn.selector for ffn in again[1:]] == [ffn.selector for ffn in rest]


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
def test_a_mode_that_every_ffn_was_given_is_saved(mode: Mode, tmp_path: Path) -> None:
    model, ffns = routed(build("llama"))
    for ffn in ffns:
        ffn.mode = mode
    save(model, tmp_path / "model")
    assert {ffn.mode for ffn in expert_ffns(load(tmp_path / "model"))} == {mode}


def test_save_pretrained_saves_them_too(tmp_path: Path) -> None:
    model, ffns = routed(build("llama"))
    for ffn in ffns:
        ffn.selector, ffn.mode = TopK(3), "soft"
    model.save_pretrained(tmp_path / "model")
    found = expert_ffns(load(tmp_path / "model"))
    assert {(ffn.selector, ffn.mode) for ffn in found} == {(TopK(3), "soft")}


def test_what_no_config_can_say_is_refused(tmp_path: Path) -> None:
    model, ffns = routed(build("llama"))
    ffns[0].mode = "soft"
    with pytest.raises(ValueError, match=r"^the FFNs are in several modes \(.* is soft, .* hard\)"):
        save(model, tmp_path / "model")
    ffns[0].mode, ffns[0].selector = "hard", Everything()
    with pytest.raises(ValueError, match=r"^a config cannot hold the selector Everything: "):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("activation", {"__class__": "os.system"}, "activation in the moe_tools block .* no kind"),
        ("selector", {"tau": 0.5}, "selector in the moe_tools block .* no kind"),
        ("layouts", {"LlamaMLP": {"up": 10**30, "down": "down_proj"}}, "no layout of an FFN: up"),
        ("layouts", {"LlamaMLP": {"up": "up_proj", "down": {}}}, "no layout of an FFN: down"),
    ],
)
def test_values_of_another_kind_are_refused(key: str, value: object, said: str) -> None:
    block = THRESHOLD.to_dict() | {key: value}
    with pytest.raises(ValueError, match=said):
        read_rows(build("llama"), Conversion.from_dict(block).layouts or {})


def test_an_error_repeats_no_endless_name() -> None:
    block = THRESHOLD.to_dict() | {"x" * 100_000: 1}
    with pytest.raises(ValueError, match="unknown key") as error:
        Conversion.from_dict(block)
    assert len(str(error.value)) < 1000
