"""A train step whose time is up: it stops at a checkpoint, and goes on bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_tools.steps.launch import Launch
from moe_tools.steps.time_limit import TimeIsUp, TimeLimit
from moe_tools.training.checkpoints import newest_checkpoint
from moe_tools.training.train import train
from tests.training.test_train import SOFT, converted, equal, text

STEP = replace(SOFT, target_sparsity=0.4, checkpoint_every=4)
UP = Launch(limit=TimeLimit(1e-9))
"""Stops after the first optimizer step."""


class Steps(TimeLimit):
    """Up after so many questions, one an optimizer step."""

    def is_up(self) -> bool:
        left = next(self.left, 0)
        return left == 0

    left: Iterator[int]


def after(steps: int) -> Launch:
    limit = Steps(1.0)
    object.__setattr__(limit, "left", iter(range(steps - 1, -1, -1)))
    return Launch(limit=limit)


def test_a_run_that_is_stopped_and_started_ends_where_an_undisturbed_one_does(
    tmp_path: Path,
) -> None:
    through, resumed = converted(), converted()
    expected = train(through, STEP, text(50), tmp_path / "through")
    work = tmp_path / "work"
    for steps, at in ((3, 3), (2, 5), (6, 11)):
        with pytest.raises(TimeIsUp, match=rf"stopped after optimizer step {at} of 12: "):
            train(converted(), STEP, text(50), work, launch=after(steps))
        assert newest_checkpoint(work) == str(work / f"checkpoint-{at}")
    measured = train(resumed, STEP, text(50), work, launch=after(2))
    assert equal(resumed, through)
    assert measured["steps"] == expected["steps"] == 12
    for name in ("lm", "efficiency", "sparsity", "reference"):
        assert measured[name] == expected[name], name


def test_every_start_takes_at_least_one_step(tmp_path: Path) -> None:
    for at in (1, 2, 3):
        with pytest.raises(TimeIsUp, match=f"after optimizer step {at} of 4"):
            train(converted(), STEP, text(16), tmp_path, launch=UP)
    through, resumed = converted(), converted()
    train(through, STEP, text(16), tmp_path / "through")
    assert train(resumed, STEP, text(16), tmp_path, launch=UP)["steps"] == 4  # the last is the end
    assert equal(resumed, through)


def test_time_that_is_not_up_changes_nothing(tmp_path: Path) -> None:
    one, other = converted(), converted()
    train(one, STEP, text(16), tmp_path / "one")
    train(other, STEP, text(16), tmp_path / "other", launch=Launch(limit=TimeLimit(1.0)))
    assert equal(one, other)
