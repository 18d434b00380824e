"""Padding is in no loss, no figure and no gradient of a train step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_tools.data import Batch, Batches
from moe_tools.data.rows import InMemory, Row
from moe_tools.recipe import Train
from moe_tools.steps.launch import Launch
from moe_tools.training.parts import trainable_parts
from moe_tools.training.teacher import Teaching
from moe_tools.training.trainer import RecipeTrainer
from tests.training.test_train import converted

LOSSES = {
    "lm": 1.0,
    "distill": 0.5,
    "distill_ffn": 0.5,
    "efficiency": 0.1,
    "separability": 0.1,
    "load_balance": 0.1,
    "l1": 0.01,
}
STEP = Train(tokens=64, mode="soft", losses=LOSSES)


def rows(*lengths: int) -> InMemory:
    draw = np.random.Generator(np.random.PCG64(0))
    texts = [draw.integers(3, 60, length) for length in lengths]
    return InMemory(16, False, [Row(ids, np.ones(len(ids), bool)) for ids in texts])


def seen(folder: Path, step: Train, batch: Batch) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures and the gradients of one batch."""
    model, donor = converted(), converted()
    made = RecipeTrainer(
        model, step, [batch], folder, 1, trainable_parts(model, step), Teaching(donor), 0, Launch()
    )
    made.create_optimizer()
    made.enter_step(1, 1)
    item = made.train_dataset[0]
    total = made.compute_loss(model, item)
    total.backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return made.read, grads


@pytest.mark.parametrize("length", [5, 9, 16])
def test_padding_changes_nothing(tmp_path: Path, length: int) -> None:
    text = rows(length)
    alone = Batches(text, "padded", 1)[0]
    padded = Batch(
        *(None if one is None else nn.functional.pad(one, (0, 16 - length)) for one in alone)  # type: ignore[arg-type]
    )
    expected, gradients = seen(tmp_path / "alone", STEP, alone)
    found, others = seen(tmp_path / "padded", STEP, padded)
    assert expected.keys() == found.keys() >= {*LOSSES, "sparsity"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)
