"""A learning rate as a share of the weights; tests/training/test_sharded.py has it in shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from moe_tools.experts.experts import expert_ffns
from moe_tools.recipe import Lora
from moe_tools.training.learning_rate import weight_size
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import DENSE, SOFT, converted, equal, text


def test_it_is_the_rate_times_the_size_of_the_weights(tmp_path: Path) -> None:
    relative, absolute = converted(), converted()
    size = weight_size(relative)
    step = replace(SOFT, lr=0.02, lr_unit="weights")
    said = train(relative, step, text(16), tmp_path / "relative")
    train(absolute, replace(SOFT, lr=0.02 * size), text(16), tmp_path / "absolute")
    assert said["lr"] == pytest.approx(0.02 * size, rel=1e-12)
    assert equal(relative, absolute)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_the_size_is_a_median_over_the_matrices_of_the_layers(family: str) -> None:
    model: Any = build(family)
    before = weight_size(model)
    outside = ("wte", "embed_tokens", "word_embeddings", "lm_head", "decoder.weight")
    rms = sorted(
        float(param.detach().square().mean().sqrt())
        for name, param in model.named_parameters()
        if param.dim() > 1 and not any(part in name for part in outside)
    )
    assert before == pytest.approx(median(rms), rel=1e-5)
    with torch.no_grad():
        for param in model.parameters():
            param *= 3
    assert weight_size(model) == pytest.approx(3 * before, rel=1e-5)


def test_one_outlier_the_head_and_routers_have_no_say() -> None:
    model: Any = converted()
    before = weight_size(model)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 100
        model.model.layers[0].self_attn.q_proj.weight *= 1000
        for ffn in expert_ffns(model):
            for param in ffn.router.parameters():
                param *= 1000
    assert weight_size(model) == pytest.approx(before, rel=0.1)


def test_a_rate_without_weights_or_beside_adapters_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    weights: Any = {"lr": 0.1, "lr_unit": "weights"}
    with pytest.raises(ValueError, match="lr_unit weights needs weights other than 0: use absol"):
        train(model, replace(DENSE, **weights), text(4), tmp_path)
    with pytest.raises(ValueError, match="lr_unit with lora is weights, but must be absolute"):
        replace(DENSE, lora=Lora(rank=2), **weights).check()
