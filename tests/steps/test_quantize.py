"""Quantize: FFN weights on the grid on which kernels store them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import attach_experts, read_conversion
from moe_tools.hosts.ffn import find_ffns
from moe_tools.kernels.few_bits import StoredBits, store_rows
from moe_tools.recipe import Quantize, parse_recipe
from moe_tools.steps.quantize import quantize
from moe_tools.steps.step import Work
from tests.families import FAMILIES, THRESHOLD, build, logits

every_bits = pytest.mark.parametrize("bits", [8, 4])


def text(tokens: int = 256) -> Tensor:
    return torch.randint(3, 60, (tokens // 16, 16), generator=torch.Generator().manual_seed(0))


def work(folder: Path) -> Work:
    def calibration(tokens: int) -> Tensor:
        return text(tokens)

    def nothing() -> Any:
        raise AssertionError

    return Work(folder, "donor", 0, calibration, nothing, nothing)


@pytest.mark.parametrize("family", FAMILIES)
@every_bits
def test_weights_lie_on_the_grid_and_logits_are_near(family: str, bits: StoredBits) -> None:
    model = build(family)
    dense = logits(model)
    errors = quantize(model, bits, text())
    for ffn in find_ffns(model):
        for rows_FD in ffn.weights().matrices():
            again_FD = store_rows(rows_FD, bits).values_FD()
            assert torch.allclose(again_FD, rows_FD.float(), rtol=1e-3, atol=1e-6)
        assert 0 < errors[ffn.name] < {8: 1e-4, 4: 2e-2}[bits]
    assert not torch.equal(logits(model), dense)
    assert torch.allclose(logits(model), dense, atol={8: 0.05, 4: 1.0}[bits])


@every_bits
def test_the_block_says_so_from_disk(bits: StoredBits, tmp_path: Path) -> None:
    model = build("llama")
    Quantize(bits=bits, tokens=64).apply(model, work(tmp_path))
    before = logits(model)
    save(model, tmp_path / "stored")
    again = load(str(tmp_path / "stored"), dtype=torch.float32)
    conversion = read_conversion(again)
    assert conversion is not None and conversion.weight_bits == bits
    assert torch.equal(logits(again), before)


def test_text_moves_the_scales_of_four_bits_alone() -> None:
    assert Quantize(bits=4).needs_text() and not Quantize(bits=8).needs_text()
    without, moved = build("llama"), build("llama")
    moved.load_state_dict(without.state_dict())
    quantize(without, 4, torch.empty(0, 16, dtype=torch.long))
    quantize(moved, 4, text())
    pairs = [
        (ffn.weights(), other.weights())
        for ffn, other in zip(find_ffns(without), find_ffns(moved), strict=True)
    ]
    assert any(not torch.equal(one.up_FD, other.up_FD) for one, other in pairs)
    assert all(torch.equal(one.down_FD, other.down_FD) for one, other in pairs)


def test_routers_come_after_it(tmp_path: Path) -> None:
    model = build("llama")
    attach_experts(model, THRESHOLD)
    with pytest.raises(ValueError, match="put it before `attach` in the recipe"):
        Quantize().apply(model, work(tmp_path))


def test_training_would_leave_the_grid() -> None:
    model = build("llama")
    recipe = parse_recipe(
        {
            "name": "any",
            "steps": [{"quantize": {"bits": 8}}, {"train": {"tokens": 64, "mode": "dense"}}],
        }
    )
    with pytest.raises(ValueError, match=r"`quantize` stored in 8 bits: put `train` before it"):
        recipe.rehearse(model, "donor")


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="quantize: bits is 5, but must be 8 or 4"):
        parse_recipe({"name": "any", "steps": [{"quantize": {"bits": 5}}]})


@every_bits
def test_high_bits_may_propose_in_a_rehearsal(bits: StoredBits) -> None:
    # of a donor with numbers, as one in a GGUF file is rehearsed
    options = {"bits": bits // 2, "of": bits}
    recipe = parse_recipe(
        {
            "name": "any",
            "steps": [
                {"quantize": {"bits": bits, "tokens": 64}},
                {"split": {"expert_size": 1, "method": "contiguous"}},
                {"attach": {"router": "few_bits", "router_options": options}},
            ],
        }
    )
    recipe.rehearse(build("llama"), "donor")
