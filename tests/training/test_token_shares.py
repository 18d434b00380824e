"""Every learned token of an optimizer step counts alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_tools.data import Batches
from moe_tools.data.rows import InMemory, Packing, Row
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import DENSE

LENGTH = 16


def conversations() -> InMemory:
    """Eight rows, of which 1 to 14 tokens are learned."""
    draw = np.random.Generator(np.random.PCG64(0))
    rows = []
    for learned in (1, 14, 2, 9, 3, 3, 14, 1):
        ids = draw.integers(3, 60, LENGTH)
        rows.append(Row(ids, np.arange(LENGTH) >= LENGTH - learned))
    return InMemory(LENGTH, False, rows)


def weights(folder: Path, packing: Packing, batch_size: int, accumulate: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build("llama")
    step = replace(DENSE, batch_size=batch_size, accumulate=accumulate, lr=1e-2, warmup=0.0)
    train(model, step, Batches(conversations(), packing, batch_size), folder)
    return {name: one.detach() for name, one in model.named_parameters()}


@pytest.mark.parametrize("packing", ["padded", "isolated", "joined"])
def test_passes_add_up_to_the_step_of_all_at_once(tmp_path: Path, packing: Packing) -> None:
    expected = weights(tmp_path / "once", packing, 8, 1)
    for size, accumulate in ((4, 2), (2, 4)):
        found = weights(tmp_path / f"{size}", packing, size, accumulate)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-4)


def test_they_do_not_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before would not pass on means of means."""
    expected = weights(tmp_path / "once", "padded", 8, 1)
    monkeypatch.setattr(Batches, "even", True)
    found = weights(tmp_path / "means", "padded", 2, 4)
    assert any((found[name] - weight).abs().max() > 1e-3 for name, weight in expected.items())
