"""Learning rates over the optimizer steps of a train step: warm-up, fall and floor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_tools.recipe import Train, parse_recipe, read_recipe, recipe_path
from moe_tools.steps.schedules import rate_factor, warmup_cosine, warmup_steps
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import DENSE, text


def parsed(**options: Any) -> Train:
    recipe = parse_recipe({"name": "x", "steps": [{"train": {"tokens": 64, **options}}]})
    (step,) = recipe.train_steps
    return step


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(100, 1000, 100), (1, 1000, 1), (0, 1000, 1), (0.06, 1000, 60), (0.0, 10, 1), (5, 3, 5)],
)
def test_a_warmup_is_a_share_or_a_number_of_steps(
    warmup: float | int, steps: int, expected: int
) -> None:
    assert warmup_steps(warmup, steps) == expected
    factors = [rate_factor(step, steps, warmup) for step in range(steps)]
    rising = factors[:expected]
    assert rising == pytest.approx([(step + 1) / expected for step in range(len(rising))])
    assert all(factor <= 1 for factor in factors)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
def test_a_rate_falls_to_its_floor_and_no_further(floor: float) -> None:
    for fall in ("cosine", "linear"):
        factors = [rate_factor(step, 100, 10, floor, fall) for step in range(9, 131)]
        assert factors[0] == factors[1] == 1.0
        assert all(one >= other for one, other in itertools.pairwise(factors))
        assert factors[-31:] == pytest.approx([floor] * 31)
    assert rate_factor(55, 100, 10, floor, "linear") == pytest.approx((1 + floor) / 2)
    assert rate_factor(55, 100, 10, floor, "cosine") == pytest.approx((1 + floor) / 2)
    early, late = (rate_factor(32, 100, 10, floor, fall) for fall in ("linear", "cosine"))
    assert late > early or floor == 1.0


def test_constant_stays_whatever_the_floor() -> None:
    factors = [rate_factor(step, 100, 10, 0.1, "constant") for step in range(100)]
    assert factors[9:] == [1.0] * 91
    assert factors == [rate_factor(step, 100, 10, 1.0) for step in range(100)]


def test_the_default_is_a_cosine_to_a_tenth() -> None:
    for step in range(60):
        assert rate_factor(step, 50, 0.1) == warmup_cosine(step, 50, 0.1, floor=0.1)
    step = Train(tokens=1)
    assert (step.warmup, step.schedule, step.floor) == (0.06, "cosine", 0.1)


@pytest.mark.parametrize("warmup", [100, 1, 0, 0.06, 0.0, "1e-2"])
def test_a_recipe_keeps_whether_steps_or_a_share_are_meant(warmup: Any) -> None:
    step = parsed(warmup=warmup)
    expected = float(warmup) if isinstance(warmup, str) else warmup
    assert step.warmup == expected and type(step.warmup) is type(expected)
    recipe = parse_recipe({"name": "x", "steps": [{"train": {"tokens": 64, "warmup": expected}}]})
    (again,) = parse_recipe(yaml.safe_load(recipe.to_yaml())).train_steps
    assert again == step and type(again.warmup) is type(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 1.0}, r"warmup is 1.0, but must be a share in \[0, 1\), or a whole number of"),
        ({"warmup": 1.0}, "write 1 for one of them"),
        ({"warmup": 100.0}, "warmup is 100.0, but must be a share"),
        ({"warmup": "100"}, "warmup is 100.0, but must be a share"),
        ({"warmup": -0.1}, "warmup is -0.1, but must be a share"),
        ({"warmup": float("nan")}, "warmup is nan, but must be a share"),
        ({"warmup": -1}, "warmup is -1, but must be 0 optimizer steps or more"),
        ({"warmup": True}, "warmup: expected float, not True"),
        ({"floor": 1.1}, r"floor is 1.1, but must be in \[0, 1\]"),
        ({"floor": -0.1}, r"floor is -0.1, but must be in \[0, 1\]"),
        ({"schedule": "cosin"}, "unknown value 'cosin'; did you mean 'cosine'"),
        ({"evaluate_every": -1}, "evaluate_every is -1, but must be 0 or more"),
        ({"evaluate_tokens": 0}, "evaluate_tokens is 0, but must be at least 1"),
    ],
)
def test_what_no_schedule_can_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(**options)


def test_the_published_numbers_are_met_exactly() -> None:
    """TurboSparse (arXiv 2406.05955): 1000 steps of warm-up to 5e-5, then a cosine to 5e-6."""
    for name in ("turbosparse_mistral_7b", "turbosparse_mixtral_8x7b"):
        recipe = read_recipe(recipe_path(name))
        (step,) = recipe.train_steps
        steps = step.tokens // recipe.block_length // (step.batch_size * step.accumulate)
        assert steps == 17_881
        rates = [
            step.lr * rate_factor(at, steps, step.warmup, step.floor, step.schedule)
            for at in (0, 998, 999, 1000, steps)
        ]
        assert rates == pytest.approx([5e-8, 4.995e-5, 5e-5, 5e-5, 5e-6])


def test_the_optimizer_gets_the_rates(tmp_path: Path) -> None:
    """Each entry of the history has the rate of its optimizer step, counted from 1."""
    step = replace(DENSE, batch_size=1, lr=1e-3, warmup=10, floor=0.5, schedule="linear")
    history = train(build("llama"), step, text(30), tmp_path)["history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert rates == pytest.approx({10: 1e-3, 20: 1e-3 * (1 - 0.5 * 9 / 20), 30: 1e-3 * 0.525})


def test_a_warmup_longer_than_the_step_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(build("llama"), replace(DENSE, warmup=40), text(16), tmp_path / "long")
    said = "takes 40 optimizer steps, but this train step has only 4: its learning rates end at 0.1"
    assert said in caplog.text
    caplog.clear()
    train(build("llama"), replace(DENSE, warmup=4), text(16), tmp_path / "short")
    assert "warm-up" not in caplog.text
