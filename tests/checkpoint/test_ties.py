"""A donor whose config ties head and embedding, but whose checkpoint holds two: both stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.hosts.upcycle import upcycle
from moe_tools.inference.optimized import optimize
from moe_tools.recipe import Attach, Recipe, Split, Step, Train
from moe_tools.runs.run import run
from moe_tools.training.lora import Lora
from tests.families import build, logits
from tests.tiny import build_tokenizer, write_passages

FAMILIES = ("llama", "gpt2", "bert")


def mistied(family: str, folder: Path) -> Tensor:
    """Writes such a donor; returns its logits."""
    own = {"mlp_bias": False} if family == "llama" else {}
    model = build(family, tie_word_embeddings=True, **own)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    expected = logits(model)
    save(model, folder, build_tokenizer())
    assert load(folder).config.tie_word_embeddings
    return expected


def assert_close(model: PreTrainedModel, expected: Tensor) -> None:
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_and_saves(family: str, tmp_path: Path) -> None:
    expected = mistied(family, tmp_path / "donor")
    save(load(tmp_path / "donor"), tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)


def test_it_is_upcycled(tmp_path: Path) -> None:
    expected = mistied("llama", tmp_path / "donor")
    save(upcycle(load(tmp_path / "donor")), tmp_path / "mixtral")
    assert_close(load(tmp_path / "mixtral"), expected)


def test_a_donor_that_is_tied_is_upcycled_tied(tmp_path: Path) -> None:
    model = upcycle(build("llama", tie_word_embeddings=True, mlp_bias=False))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_converted(family: str, stream: bool, tmp_path: Path) -> None:
    expected = mistied(family, tmp_path / "donor")
    convert(tmp_path, Split(expert_size=4), Attach(start="open"), stream=stream)
    converted = load(tmp_path / "out", dtype=torch.float32)
    assert_close(converted, expected)
    if family == "llama":
        assert_close(optimize(converted), expected)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_it_is_trained(lora: Lora | None, tmp_path: Path) -> None:
    expected = mistied("llama", tmp_path / "donor")
    convert(tmp_path, Train(tokens=64, lr=0.0, lora=lora))
    assert_close(load(tmp_path / "out", dtype=torch.float32), expected)


def convert(folder: Path, *steps: Step, stream: bool | None = None) -> None:
    write_passages(folder / "text.txt", 400)
    recipe = Recipe("test", steps, data=str(folder / "text.txt"), block_length=16)
    run(recipe, str(folder / "donor"), folder / "out", dtype=torch.float32, stream=stream)
