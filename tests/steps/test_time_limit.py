"""How long a run may take, and that its processes hear the same."""

from __future__ import annotations

import time

import pytest

from moe_tools import processes
from moe_tools.steps.time_limit import TimeIsUp, TimeLimit


def test_time_is_up_when_it_has_passed() -> None:
    now = time.monotonic()
    assert not TimeLimit(1.0).is_up()
    assert not TimeLimit(1.0, began=now - 3500).is_up()
    assert TimeLimit(1.0, began=now - 3601).is_up()
    assert TimeLimit(0.5, began=now - 1801).is_up()


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_hours_are_a_number_above_0(hours: float) -> None:
    with pytest.raises(ValueError, match=r"max_hours is .*, but must be a number above 0"):
        TimeLimit(hours)


@pytest.mark.parametrize(("left_here", "left_elsewhere"), [(True, False), (False, True)])
def test_one_process_whose_time_is_up_stops_all(
    left_here: bool, left_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "all_agree", lambda left: left and left_elsewhere)
    assert TimeLimit(1.0, began=time.monotonic() - (0 if left_here else 3601)).is_up()


def test_what_is_said_names_the_hours_and_the_way_on() -> None:
    stopped = TimeLimit(2.5).stopped("after optimizer step 5 of 9")
    assert isinstance(stopped, TimeIsUp)
    assert str(stopped) == (
        "stopped after optimizer step 5 of 9: the time of the run is up (--max-hours 2.5); nothing "
        "is lost, and the same command goes on from there"
    )
