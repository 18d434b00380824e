"""Runs that read their text several times, or in another packing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_tools.checkpoint.loading import load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.data import Rows
from moe_tools.data.rows import Epochs
from moe_tools.recipe import Attach, Recipe, Split, Train
from moe_tools.runs.run import run
from moe_tools.runs.text import RunText
from tests.data.test_chat import CHAT, write_chat
from tests.families import EXPERT_SIZE, build

LENGTH = 32
FP32: dict[str, Any] = {"dtype": torch.float32}
TRAIN = Train(epochs=1, batch_size=2, lr=1e-3, checkpoint_every=3)
SPARSE = replace(TRAIN, mode="straight", target_sparsity=0.4, losses={"lm": 1.0, "distill": 0.5})
STEPS = (replace(TRAIN, epochs=2), Split(EXPERT_SIZE, tokens=256), Attach(tokens=256), SPARSE)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/ with a chat template, and chat.jsonl."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("epochs")
    save(build("llama", bos_token_id=1, eos_token_id=1, vocab_size=80), folder / "donor", CHAT)
    write_chat(folder / "chat.jsonl", 60)
    return folder


def recipe(work: Path, **more: Any) -> Recipe:
    return Recipe("chat", STEPS, data=str(work / "chat.jsonl"), block_length=LENGTH, **more)


def text_of(work: Path, recipe: Recipe) -> RunText:
    def no_donor() -> Any:
        raise AssertionError

    return RunText(recipe, load_tokenizer(str(work / "donor")), work, no_donor)


def first_tokens(rows: Rows) -> list[list[int]]:
    return [rows.row(at).ids_T.tolist() for at in range(len(rows))]


def test_each_step_goes_on_in_the_order_of_its_epoch(work: Path) -> None:
    text = text_of(work, recipe(work, packing="padded"))
    assert isinstance(text.rows, Epochs)
    once = first_tokens(text.rows.once)
    steps = [first_tokens(text.of_step(at).rows) for at in (0, 3)]  # type: ignore[union-attr]
    assert steps[0][: len(once)] == once and len(steps[0]) == 2 * len(once)
    assert sorted(steps[0][len(once) :]) == sorted(steps[1]) == sorted(once)
    assert once != steps[0][len(once) :] != steps[1] != once


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["joined", "isolated", "padded"])
def test_conversations_are_trained_on_and_evaluated(
    work: Path, tmp_path: Path, packing: Any
) -> None:
    """LTE on conversations, with its control; the same figures again from the folder."""
    donor, own = str(work / "donor"), recipe(work, packing=packing)
    out = run(own, donor, tmp_path / "out", control=True, **FP32)
    metrics = json.loads((out / "metrics.json").read_text())
    text = text_of(work, own)
    steps = [figures for figures in metrics["steps"] if "lm" in figures]
    assert metrics["text"] == text.fingerprint
    control = json.loads((out / "control" / "metrics.json").read_text())
    assert control["train_tokens"] == pytest.approx(metrics["train_tokens"], rel=0.05)
    assert steps[-1]["sparsity"] > 0.2
    again = run(own, donor, tmp_path / "again", **FP32)
    one, other = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_samples_of_the_donor_have_no_epochs(work: Path, tmp_path: Path) -> None:
    own = replace(recipe(work), data="self")
    with pytest.raises(ValueError, match="'self', the donor's own samples, which have no end"):
        run(own, str(work / "donor"), tmp_path / "out", **FP32)
    assert not (tmp_path / "out" / "recipe.yaml").exists()
