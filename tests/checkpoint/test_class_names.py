"""The class that a folder names: stock where every program computes it, else one that none has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer

import moe_tools
from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.class_names import PREFIX
from moe_tools.checkpoint.loading import is_classifier_source, load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts, write_conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.names import CONFIG
from tests.checkpoint.test_composite import donor
from tests.checkpoint.test_loading import convert, edit_config
from tests.families import SPLIT, THRESHOLD, aligned, build, load_stock, logits
from tests.test_with_others import train

FORMAT_1 = Path(__file__).with_name("format_1_llama")


def swapped(kind: str) -> PreTrainedModel:
    model = build("llama")
    swap_activations(model, Conversion("donor", activation={"kind": kind}))
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def named(folder: Path) -> str:
    """The class that a program finds which looks into `config.json`."""
    (name,) = config_of(folder)["architectures"]
    return name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert", "t5-gated", "mixtral"])
def test_no_program_has_the_class_of_a_routed_folder(family: str, tmp_path: Path) -> None:
    """llama.cpp's converter, Ollama, vLLM and SGLang look it up among their own."""
    model = convert(family)
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert named(folder) == PREFIX + type(model).__name__
        assert not hasattr(transformers, named(folder))
    assert model.config.architectures == [type(model).__name__]
    again = load(tmp_path / "ours")
    assert type(again) is type(model)
    assert torch.equal(logits(aligned(again)), logits(model))


@pytest.mark.parametrize("kind", ["relu", "drelu"])
def test_nor_that_of_another_activation(kind: str, tmp_path: Path) -> None:
    """Many of them compute SiLU in a llama, whatever its config names."""
    model = swapped(kind)
    model.save_pretrained(tmp_path / "out")
    assert named(tmp_path / "out") == "MoeToolsLlamaForCausalLM"
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_model_that_everyone_computes_has_its_stock_class(tmp_path: Path) -> None:
    split = build("llama")
    write_conversion(split, SPLIT)
    save(convert(), tmp_path / "routed")
    save(build("llama"), tmp_path / "dense")
    save(split, tmp_path / "split")
    save(load(tmp_path / "routed", routed=False), tmp_path / "unrouted")
    for folder in ("dense", "split", "unrouted"):
        assert named(tmp_path / folder) == "LlamaForCausalLM"


def test_the_name_is_one_of_files_alone(tmp_path: Path) -> None:
    """What looks a class up by its name finds it, where moe-tools is imported."""
    save(convert(), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "config")
    assert config_of(tmp_path / "config") == config_of(tmp_path / "out")


def test_stock_transformers_loads_the_dense_model_of_it(tmp_path: Path) -> None:
    save(convert(), tmp_path / "out")
    with transformers_patched(False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert not expert_ffns(model)
    expected = load_stock(transformers.LlamaForCausalLM, tmp_path / "out").eval()
    assert torch.equal(logits(model), logits(expected))


def test_without_the_patch_moe_tools_writes_and_reads_the_same(tmp_path: Path) -> None:
    model, encoder = convert(), convert("bert")
    moe_tools.unpatch_transformers()
    try:
        save(model, tmp_path / "out")
        save(encoder, tmp_path / "encoder")
        assert named(tmp_path / "out") == "MoeToolsLlamaForCausalLM"
        assert type(load(tmp_path / "encoder")) is type(encoder)
        assert not is_classifier_source(str(tmp_path / "encoder"))
    finally:
        moe_tools.patch_transformers()


def test_a_checkpoint_of_trainer_has_it_too(tmp_path: Path) -> None:
    save(convert(), tmp_path / "out")
    trainer: Trainer = train(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "t")
    trainer.save_model(str(tmp_path / "last"))
    folders = [tmp_path / "last", *(tmp_path / "t").glob("checkpoint-*")]
    assert len(folders) > 1
    assert {named(folder) for folder in folders} == {"MoeToolsLlamaForCausalLM"}


def test_folders_that_name_the_stock_class_are_read_for_ever(tmp_path: Path) -> None:
    save(convert(), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    edit_config(tmp_path / "old", architectures=["LlamaForCausalLM"])
    shutil.copytree(FORMAT_1, tmp_path / "older")
    for folder in ("old", "older"):
        assert named(tmp_path / folder) == "LlamaForCausalLM"
        old = load(tmp_path / folder)
        old.save_pretrained(tmp_path / f"{folder} again")
        assert named(tmp_path / f"{folder} again") == "MoeToolsLlamaForCausalLM"
        assert torch.equal(logits(aligned(load(tmp_path / f"{folder} again"))), logits(old))
    assert torch.equal(logits(load(tmp_path / "old")), logits(load(tmp_path / "new")))


def test_the_part_that_is_the_language_model_names_none_either(
    tmp_path: Path,
) -> None:
    """llama.cpp's converter prefers what `text_config` says."""
    model = donor()
    attach_experts(model, THRESHOLD)
    save(model, tmp_path / "out")
    assert named(tmp_path / "out") == "MoeToolsGemma3ForConditionalGeneration"
    model.config.text_config.architectures = ["Gemma3ForCausalLM"]
    save(model, tmp_path / "again")
    assert config_of(tmp_path / "again")["text_config"]["architectures"] == [
        "MoeToolsGemma3ForCausalLM"
    ]
    assert model.config.text_config.architectures == ["Gemma3ForCausalLM"]
    assert load(tmp_path / "again").config.text_config.architectures == ["Gemma3ForCausalLM"]
