"""A beta that rises: SiLU becomes ReLU in the course of a train step, and the config says so."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, read_block
from moe_tools.recipe import Swap, Train
from moe_tools.steps.swap import swap
from moe_tools.training.sharpen import Sharpening, swishes
from moe_tools.training.train import train
from tests.families import build, logits
from tests.killed import Killed, kill_at

STEP = Train(tokens=1, batch_size=4, lr=1e-3, beta=16.0, ramp=0.5)
NO_TEXT = torch.empty(0, 8, dtype=torch.long)


def text(rows: int) -> Tensor:
    return torch.randint(3, 64, (rows, 16), generator=torch.Generator().manual_seed(1))


def swished(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = build(family)
    swap(model, Swap({"kind": "swish_beta"}), Conversion("donor"), NO_TEXT)
    return model


def test_swish_in_place_of_silu_changes_nothing() -> None:
    torch.manual_seed(0)
    expected = logits(build("llama"))
    torch.testing.assert_close(logits(swished()), expected)


def test_beta_rises_by_one_ratio_and_stays() -> None:
    model = swished()
    sharpening = Sharpening(model, 16.0, 0.5)
    seen = []
    for step in range(1, 9):
        sharpening.enter(step, 8)
        (beta,) = {module.beta for module in swishes(model)}
        seen.append(beta)
    assert seen == pytest.approx([1, 2, 4, 8, 16, 16, 16, 16])


def test_a_train_step_ends_near_relu_and_says_so(tmp_path: Path) -> None:
    model = swished()
    train(model, STEP, text(64), tmp_path)
    block = read_block(model.config)
    assert block is not None and block.activation == {"kind": "swish_beta", "beta": 16.0}
    sharp = copy.deepcopy(model)
    swap(sharp, Swap({"kind": "relu"}), block, NO_TEXT)
    sudden = swished()
    before = logits(sudden)
    swap(sudden, Swap({"kind": "relu"}), Conversion("donor"), NO_TEXT)
    gradual = (logits(sharp) - logits(model)).norm()
    assert gradual < 0.3 * (logits(sudden) - before).norm()


def test_a_run_that_resumes_goes_on_with_the_beta_of_its_step(tmp_path: Path) -> None:
    step = replace(STEP, checkpoint_every=3)
    through, killed = swished(), swished()
    train(through, step, text(48), tmp_path / "through")
    kill_at(killed, 6)
    with pytest.raises(Killed):
        train(killed, step, text(48), tmp_path / "work")
    resumed = swished()
    train(resumed, step, text(48), tmp_path / "work")
    for one, other in zip(resumed.parameters(), through.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_has_no_beta_to_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"beta rises in Swish alone: put `swap: .*swish_beta"):
        train(build("llama"), STEP, text(16), tmp_path)
    flat = build("llama")
    swap(flat, Swap({"kind": "swish_beta", "beta": 0.0}), Conversion("donor"), NO_TEXT)
    with pytest.raises(ValueError, match="beta rises by ratios, and starts at 0"):
        train(flat, STEP, text(16), tmp_path)
    with pytest.raises(ValueError, match=r"beta is 0\.0, but must be above 0"):
        replace(STEP, beta=0.0).check()
