"""A learning rate as a share of the weights; tests/training/test_sharded.py has it in shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.recipe import Lora
from moe_tools.training.relative_lr import weight_size
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import DENSE, SOFT, converted, equal, text


def test_it_is_the_rate_times_the_size_of_the_weights(tmp_path: Path) -> None:
    relative, absolute = converted(), converted()
    size = weight_size(relative)
    said = train(relative, replace(SOFT, relative_lr=0.02), text(16), tmp_path / "relative")
    train(absolute, replace(SOFT, lr=0.02 * size), text(16), tmp_path / "absolute")
    assert said["lr"] == pytest.approx(0.02 * size, rel=1e-12)
    assert equal(relative, absolute)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_the_size_is_a_median_over_the_matrices_of_the_ffns(family: str) -> None:
    model = build(family)
    before = weight_size(model)
    inside = ("mlp.", "intermediate.dense.", ".output.dense.")
    ffn = [
        param
        for name, param in model.named_parameters()
        if any(part in name for part in inside) and "attention" not in name and param.dim() > 1
    ]
    rms = sorted(float(each.detach().square().mean().sqrt()) for each in ffn)
    assert rms[0] <= before <= rms[-1]
    with torch.no_grad():
        for param in model.parameters():
            param *= 3
    assert weight_size(model) == pytest.approx(3 * before, rel=1e-5)


def test_one_outlier_and_what_stands_beside_the_ffns_have_no_say() -> None:
    model: Any = build("llama", num_hidden_layers=3)
    before = weight_size(model)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 100
        model.model.layers[0].mlp.gate_proj.weight *= 1000
    assert weight_size(model) == pytest.approx(before, rel=0.1)


def test_a_rate_without_weights_or_beside_adapters_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    with pytest.raises(ValueError, match="relative_lr is a share of the FFNs' weights, and they"):
        train(model, replace(DENSE, relative_lr=0.1), text(4), tmp_path)
    with pytest.raises(ValueError, match=r"relative_lr with lora is 0\.1, but must be 0: adapters"):
        replace(DENSE, relative_lr=0.1, lora=Lora(rank=2)).check()
    with pytest.raises(ValueError, match="relative_lr is -1, but must be 0 or more"):
        replace(DENSE, relative_lr=-1).check()
