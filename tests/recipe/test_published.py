"""Published schedules beside the paper's tables, the loss they are of, and our recipes."""

from __future__ import annotations

import pytest
import torch

from moe_tools.recipe import Train, read_recipe, recipe_path
from moe_tools.steps.schedules import weight_at
from moe_tools.training.losses import Observed, l1
from tests.prosparse_schedules import CONTEXT, PROSPARSE, l1_stages, l1_weight

ACCUMULATED = {
    "1b": [49.15, 73.73, 98.30, 122.88, 172.03],
    "7b": [10.49, 12.58, 20.97, 25.17, 33.55, 34.60],
    "13b": [46.14, 56.62, 90.18, 92.27, 125.83, 134.22],
}
"""Billions of tokens after each stage, as tables 6 and 7 of arXiv 2402.13516 print them."""
every_size = pytest.mark.parametrize("size", PROSPARSE)


@every_size
def test_steps_and_batch_give_the_accumulated_tokens(size: str) -> None:
    schedule = PROSPARSE[size]
    billions = [schedule.batch_tokens * step / 1e9 for step, _ in schedule.lambdas]
    assert [round(tokens, 2) for tokens in billions] == ACCUMULATED[size]


def test_the_weight_makes_our_mean_what_the_public_sum_is() -> None:
    """One forward pass of 7 tokens through 3 FFNs; the sum is taken as the public code takes it."""
    hidden_TF = [torch.randn(7, 11).relu() for _ in range(3)]
    published = 0.2 * sum(torch.norm(h_TF, p=1).item() * 1e-8 for h_TF in hidden_TF)
    weight = l1_weight(0.2, ffns=3, forward_tokens=7)
    ours = weight * l1(Observed(hidden_TF=hidden_TF)).item()
    assert ours == pytest.approx(published, rel=1e-5)


def test_a_7b_by_hand() -> None:
    stages = l1_stages(PROSPARSE["7b"])
    at = {step: weight_at(stages, step, 16_500) for step in (1, 5000, 5001, 6000, 8000, 16_500)}
    unit = 1e-8 * 4096 * 32
    assert at[1] == at[5000] == 0
    assert at[5001] == at[6000] == pytest.approx(5e-3 * unit)
    assert at[8000] == pytest.approx((5e-3 + 5e-2) / 2 * unit)  # half way to stage 2's end
    assert at[16_500] == pytest.approx(2.62144e-4)


@every_size
def test_more_blocks_on_a_device_weigh_more(size: str) -> None:
    once, twice = (l1_stages(PROSPARSE[size], forward_tokens=n * CONTEXT) for n in (1, 2))
    for one, two in zip(once, twice, strict=True):
        assert (two.until, two.weight) == (one.until, pytest.approx(2 * one.weight))


@every_size
def test_the_recipe_says_what_the_table_says(size: str) -> None:
    recipe, schedule = read_recipe(recipe_path(f"prosparse_{size}")), PROSPARSE[size]
    (step,) = [step for step in recipe.steps if isinstance(step, Train)]
    stages = step.losses["l1"]
    assert isinstance(stages, tuple)
    for stage, expected in zip(stages, l1_stages(schedule), strict=True):
        assert (1000 * stage.until, stage.curve) == (expected.until, expected.curve)
        assert stage.weight == pytest.approx(expected.weight, rel=1e-5)
    assert recipe.block_length == CONTEXT
    assert step.batch_size * step.accumulate * CONTEXT == schedule.batch_tokens
    assert step.tokens == schedule.batch_tokens * schedule.lambdas[-1][0]
