"""A model without numbers is the model that `load` gives, but for the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.experts.conversion import Conversion, read_conversion
from moe_tools.hosts.ffn import host_state_dict
from moe_tools.recipe import Swap
from moe_tools.steps.swap import swap
from tests.families import FAMILIES, build, routed


def swapped(family: str) -> PreTrainedModel:
    model = build(family)
    swap(model, Swap({"kind": "fatrelu"}), Conversion("donor"), torch.zeros(0, 0))
    return model


MADE = {"dense": build, "swapped": swapped, "routed": lambda family: routed(build(family))[0]}


def tensors(model: PreTrainedModel) -> dict[str, Any]:
    return {key: (one.shape, one.dtype) for key, one in host_state_dict(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", MADE)
def test_a_skeleton_has_every_tensor_of_a_model(kind: str, family: str, tmp_path: Path) -> None:
    save(MADE[kind](family), tmp_path / "out")
    expected = load(tmp_path / "out", dtype=torch.bfloat16)
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()  # config.json is enough
    made = skeleton(str(tmp_path / "out"))
    assert tensors(made) == tensors(expected)
    assert {one.device.type for one in made.parameters()} == {"meta"}
    assert read_conversion(made) == read_conversion(expected)
    assert made.num_parameters() == expected.num_parameters()
    assert not made.training


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_language_model_gets_the_head_of_a_classifier(family: str, tmp_path: Path) -> None:
    build(family).config.save_pretrained(tmp_path)
    made = skeleton(str(tmp_path), task="classify")
    assert skeleton(str(tmp_path), task="regress").config.num_labels == 1
    assert type(made).__name__.endswith("ForSequenceClassification")
    again = type(made)(made.config)
    again.save_pretrained(tmp_path / "classifier")
    assert type(skeleton(str(tmp_path / "classifier"), task="classify")) is type(made)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "^cannot read the config of .*none"),
        ({"model_type": "no_such"}, "^cannot read the config of .*no_such"),
        ({}, "^cannot read the config of"),
        ({"model_type": "mamba", "moe_tools": {"format": 9}}, "moe_tools format 9; this version"),
        ({"model_type": "clip"}, "^cannot build a model from the config of"),
    ],
    ids=["nothing", "unknown", "empty", "newer", "no language"],
)
def test_what_is_no_model_is_named(config: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        skeleton(str(folder))
