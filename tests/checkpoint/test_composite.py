"""A model of pictures and text: its language model is converted, and never loads dense unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.twin import build_twin
from tests.families import THRESHOLD, load_stock, randomize

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IDS = torch.arange(3, 12)[None]


def donor() -> PreTrainedModel:
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1)
    return build_twin(Gemma3ForConditionalGeneration, config)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def routed(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = donor()
    attach_experts(model, THRESHOLD)
    randomize(model)
    save(model, tmp_path / "out")
    return model, tmp_path / "out"


def test_what_sees_pictures_stays_dense(routed: tuple[PreTrainedModel, Path]) -> None:
    names = [ffn.name for ffn in expert_ffns(routed[0])]
    assert names == [f"model.language_model.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText, None])
def test_every_loader_gives_the_routed_model(
    auto: type | None, routed: tuple[PreTrainedModel, Path]
) -> None:
    model, folder = routed
    loaded = load(folder) if auto is None else auto.from_pretrained(folder)
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))


def test_without_its_head_it_is_routed_as_well(routed: tuple[PreTrainedModel, Path]) -> None:
    assert len(expert_ffns(AutoModel.from_pretrained(routed[1]))) == 2


def test_a_class_that_cannot_read_the_folder_is_refused(
    routed: tuple[PreTrainedModel, Path],
) -> None:
    with pytest.raises(ValueError, match="lacks the tensors"):
        Gemma3ForCausalLM.from_pretrained(routed[1])


def test_a_swap_names_the_activation_in_the_right_part(tmp_path: Path) -> None:
    model = donor()
    swap_activations(model, Conversion("donor", activation={"kind": "relu"}))
    save(model, tmp_path / "out")
    stock = load_stock(Gemma3ForConditionalGeneration, tmp_path / "out")
    stock.set_attn_implementation("eager")
    assert stock.config.text_config.hidden_activation == "relu"
    assert stock.config.vision_config.hidden_act != "relu"
    assert torch.equal(logits(stock.eval()), logits(model))
