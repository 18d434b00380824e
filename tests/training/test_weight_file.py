"""Weights in a file and back, whatever shares memory with what."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moe_tools.hosts.ffn import find_ffns
from moe_tools.training.weight_file import load_weights, save_weights
from tests.families import FAMILIES, build, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_taken_apart_comes_back(family: str, tmp_path: Path) -> None:
    model = build(family, tie_word_embeddings=True)
    find_ffns(model)  # takes the experts of an MoE host apart
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(logits(other), logits(model))


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    save_weights(model, tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()


@pytest.mark.parametrize("width", [2, 4])
def test_the_weights_of_another_model_are_refused(width: int, tmp_path: Path) -> None:
    save_weights(nn.Linear(2, width), tmp_path / "weights.safetensors")
    model = nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match=r"is of another model: they differ in bias$"):
        load_weights(model, tmp_path / "weights.safetensors")
