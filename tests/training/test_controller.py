"""The reference and what follows it, on simulated training runs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.recipe import Stage
from moe_tools.steps.schedules import warmup_cosine, weight_at
from moe_tools.training.controller import DRIVEN, ZEROS, Reference, WeightController

SHARES = st.floats(0.01, 0.99)
STEPS = 400


@given(SHARES, SHARES, st.integers(1, 2000), st.floats(0.01, 1.0))
def test_the_reference_goes_one_way_from_the_start_to_the_target(
    start: float, target: float, steps: int, ramp: float
) -> None:
    reference = Reference(start, target, steps, ramp)
    path = [reference.at(step) for step in range(steps + 1)]
    assert path[0] == start
    for step in range(math.ceil(ramp * steps), steps + 1):
        assert path[step] == pytest.approx(target, abs=1e-9)
    sign = 1 if target >= start else -1
    assert all(sign * (b - a) >= -1e-12 for a, b in itertools.pairwise(path))
    assert all(min(start, target) - 1e-9 <= p <= max(start, target) + 1e-9 for p in path)


def test_the_reference_is_half_way_in_the_middle_of_the_ramp() -> None:
    assert Reference(0.1, 0.5, 100, 0.5).at(25) == pytest.approx(0.3)


@given(SHARES, st.floats(0.0, 0.49), st.integers(20, 500))
def test_what_steps_draw_fills_the_range_evenly(target: float, vary: float, steps: int) -> None:
    reference = Reference(target, target, steps, 0.0, vary)
    drawn = [reference.after(step) for step in range(1, steps)]
    assert all(abs(one - target) <= vary + 1e-9 and 0 < one < 1 for one in drawn)
    quarters = [target + vary * (part / 2 - 1) for part in range(5)]
    inside = [sum(low <= one < high for one in drawn) for low, high in itertools.pairwise(quarters)]
    if vary > 0.01 and vary < target < 1 - vary:
        assert all(abs(count - len(drawn) / 4) <= 3 for count in inside)
    assert reference.after(steps) == pytest.approx(target)


@pytest.mark.parametrize("step", [0, 1, 7, 100])
def test_without_a_ramp_the_target_is_asked_for_at_once(step: int) -> None:
    assert Reference(0.0, 0.5, 10, 0.0).at(step) == 0.5


# --- eta


def plant(
    gain: float,
    *,
    lag: float,
    noise: float,
    restoring: bool,
    start: float = 0.02,
    unit: float = 1.0,
) -> Callable[[float], float]:
    """A training run: sparsity as a function of the eta of each step, given in `unit`s.

    The state is a mean logit that integrates: eta pushes it, the language loss pulls it back
    (restoring: the more the sparser), Adam bounds the rate, momentum is a first-order lag, and a
    batch measures with noise.
    """
    draw = random.Random(0)
    state, rate, fastest = math.log(start / (1 - start)), 0.0, 0.1

    def step(eta: float) -> float:
        nonlocal state, rate
        pull = 0.1 / (1 + math.exp(-state)) if restoring else 0.1
        rate += (fastest * math.tanh(gain * (eta / unit - pull) / fastest) - rate) / lag
        state += rate
        return min(1.0, max(0.0, 1 / (1 + math.exp(-state)) + draw.gauss(0, noise)))

    return step


def controller_of(drive: str) -> WeightController:
    """As a train step starts with it."""
    return WeightController(DRIVEN[drive].start, DRIVEN[drive].bounds)


def follow(
    sparsity_of: Callable[[float], float],
    target: float,
    *,
    drive: str = "eta",
    start: float = 0.02,
) -> list[float]:
    """Sparsity at each step of a run under a drive."""
    reference, controller = Reference(start, target, STEPS, 0.6), controller_of(drive)
    path: list[float] = []
    for step in range(1, STEPS + 1):
        path.append(sparsity_of(controller.weight))
        controller.update(reference.at(step), path[-1])
    return path


@pytest.mark.parametrize("restoring", [True, False], ids=["restoring", "constant"])
@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize("lag", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_eta_brings_plants_of_any_gain_to_the_target(
    target: float, lag: float, noise: float, restoring: bool
) -> None:
    for gain in (0.02, 0.06, 0.2, 0.6, 2.0):
        path = follow(plant(gain, lag=lag, noise=noise, restoring=restoring), target)
        assert sum(path[-20:]) / 20 == pytest.approx(target, abs=0.02), gain
        assert max(path) < target + 0.05 + 3 * noise, gain


def test_eta_comes_down_from_above() -> None:
    """The hard stage may start sparser than its target."""
    path = follow(plant(0.2, lag=5, noise=0, restoring=True, start=0.9), 0.5, start=0.9)
    assert path[-1] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("drive", ZEROS)
@pytest.mark.parametrize("noise", [0.0, 0.003])
@pytest.mark.parametrize(("start", "target"), [(0.5, 0.6), (0.5, 0.8), (0.5, 0.9), (0.6, 0.95)])
def test_lambda_finds_its_scale(drive: str, noise: float, start: float, target: float) -> None:
    """ReLU starts near a half; what a unit of lambda does is known to four decades at best."""
    for unit in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        run = plant(0.3, lag=5, noise=noise, restoring=True, start=start, unit=unit)
        path = follow(run, target, drive=drive, start=start)
        assert sum(path[-20:]) / 20 == pytest.approx(target, abs=0.01), unit
        assert max(path) < target + 0.03 + 3 * noise, unit


@given(st.lists(st.tuples(SHARES, SHARES), max_size=50))
def test_eta_stays_positive_and_bounded_whatever_is_measured(
    pairs: list[tuple[float, float]],
) -> None:
    controller = controller_of("eta")
    low, high = controller.bounds
    for reference, measured in pairs:
        before = controller.weight
        eta = controller.update(reference, measured)
        assert low <= eta <= high
        assert before * math.exp(-0.5) - 1e-9 <= eta <= before * math.exp(0.5) + 1e-9


def test_eta_goes_on_from_its_two_numbers() -> None:
    """What a checkpoint keeps is all there is."""
    through = controller_of("eta")
    for step in range(5):
        through.update(0.3, 0.05 * step)
    resumed = WeightController(through.weight, through.bounds, error=through.error)
    assert [through.update(0.3, 0.3), through.update(0.4, 0.2)] == [
        resumed.update(0.3, 0.3),
        resumed.update(0.4, 0.2),
    ]


# --- learning rates


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.06), (100, 0.0), (7, 0.5), (1000, 1.0)])
def test_the_rate_warms_up_to_1_and_cools_to_the_floor(steps: int, warmup: float) -> None:
    factors = [warmup_cosine(step, steps, warmup) for step in range(steps + 1)]
    warm = max(1, round(warmup * steps))
    assert factors[0] == 1 / warm
    assert factors[warm - 1] == max(factors) == 1.0
    assert all(a < b for a, b in itertools.pairwise(factors[:warm]))
    assert all(a >= b for a, b in itertools.pairwise(factors[warm:]))
    if warm < steps:
        assert factors[-1] == pytest.approx(0.1)
        middle = warmup_cosine((warm + steps) // 2, steps, warmup)
        assert middle == pytest.approx(0.55, abs=1.5 / (steps - warm))


def test_no_step_is_without_a_rate() -> None:
    assert warmup_cosine(0, 1, 0.06) == 1.0
    assert all(warmup_cosine(step, 10, 1.0) > 0 for step in range(30))
    assert warmup_cosine(30, 10, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(10, 10, 0.1, floor=0.0) == pytest.approx(0.0)


# --- the weights of losses


def prosparse(lambdas: list[float], ends: list[int], t: int) -> float:
    """Algorithm 1 of arXiv 2402.13516, line by line."""
    if t <= ends[0]:
        return lambdas[0]
    for i in range(1, len(ends)):
        if ends[i - 1] < t <= ends[i]:
            angle = -math.pi / 2 + (t - ends[i - 1]) / (ends[i] - ends[i - 1]) * math.pi
            eta = (math.sin(angle) + 1) / 2
            return lambdas[i - 1] + eta * (lambdas[i] - lambdas[i - 1])
    raise AssertionError(t)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=6))
def test_stages_are_those_of_prosparse_in_every_step(parts: list[tuple[int, float]]) -> None:
    ends = list(itertools.accumulate(length for length, _ in parts))
    lambdas = [weight for _, weight in parts]
    steps = ends[-1]
    for unit in (1, steps, 1000):
        stages = [Stage(end / unit, weight) for end, weight in zip(ends, lambdas, strict=True)]
        for t in range(1, steps + 1):
            expected = prosparse(lambdas, ends, t)
            assert weight_at(tuple(stages), t, steps) == pytest.approx(expected, abs=1e-12), t


def test_a_stage_ends_with_its_weight_and_starts_with_the_last_one() -> None:
    stages = (Stage(0.29, 0.0), Stage(0.57, 2.0), Stage(1.0, 1.0))
    weights = [weight_at(stages, t, 100) for t in range(1, 101)]
    assert weights[:29] == [0.0] * 29  # 0.29 * 100 is less than 29 in floating point
    assert weights[28:57] == sorted(weights[28:57]) and weights[56] == 2.0
    assert weights[56:] == sorted(weights[56:], reverse=True) and weights[-1] == 1.0
    assert weights[42] == pytest.approx(1.0)  # half way at step 43


def test_a_constant_stage_has_its_weight_at_once() -> None:
    stages = (Stage(0.5, 0.0), Stage(0.7, 3.0, "constant"), Stage(1.0, 5.0))
    weights = [weight_at(stages, t, 10) for t in range(1, 11)]
    assert weights[:7] == [0.0] * 5 + [3.0] * 2
    assert 3.0 < weights[7] < weights[8] < weights[9] == 5.0


def test_a_number_is_the_same_in_every_step() -> None:
    assert {weight_at(0.5, t, 10) for t in range(1, 11)} == {0.5}
