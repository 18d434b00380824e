"""Converted folders on a card under quantisers of eight bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.inference.optimized import optimize
from tests.checkpoint.test_quantised import QUANTISERS, converted, stock
from tests.families import logits

EIGHT_BITS = {name: QUANTISERS[name] for name in ("bitsandbytes8", "torchao")}
every_quantiser = pytest.mark.parametrize("quantiser", EIGHT_BITS.values(), ids=EIGHT_BITS)


def options(quantiser: Callable[[], Any], place: str) -> dict[str, Any]:
    return {"quantization_config": quantiser(), "device_map": place}


@every_quantiser
def test_with_every_expert_on_it_is_the_stock_class_under_the_same_quantiser(
    quantiser: Callable[[], Any], place: str, tmp_path: Path
) -> None:
    save(converted(), tmp_path)
    with transformers_patched(False):
        exact = logits(stock(tmp_path, device_map=place))
        expected = logits(stock(tmp_path, **options(quantiser, place)))
    model = stock(tmp_path, **options(quantiser, place))
    assert model.device.type == place and len(expert_ffns(model)) == 2
    assert expert_ffns(model)[0].router.get_parameter("weight").dtype == torch.float32
    assert (expected - exact).abs().max() > 0
    with every_expert_on(model):
        assert torch.equal(logits(model), expected)


@every_quantiser
def test_it_stays_as_it_is_and_says_why(
    quantiser: Callable[[], Any], place: str, tmp_path: Path
) -> None:
    """Packed are plain weights alone."""
    save(converted(), tmp_path)
    model = stock(tmp_path, **options(quantiser, place))
    before = logits(model)
    with pytest.raises(ValueError, match=r"has no FFN to optimise: .* no plain"):
        optimize(model)
    assert torch.equal(logits(model), before)
