"""Runs that are killed (-9) at random moments, once or several times, and then resumed."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.children import spread
from tests.faults.runs import RUNS, Run, differences, phase

AGAIN = 0.3
"""Share of the kills after which the resumed run is killed, too."""
LEAVE = 0.3
"""Seconds, at most, that the other of two processes goes on after one was killed."""


@dataclass(frozen=True)
class Trial:
    """One run to disturb."""

    number: int
    run: Run
    moments: tuple[float, ...]
    """When it is killed: shares of the time of an undisturbed run."""


@dataclass(frozen=True)
class Found:
    """What came of a trial."""

    trial: Trial
    phases: tuple[str, ...]
    """How far the run was, each time that it was killed."""
    faults: tuple[str, ...]
    """Why it was not completed, or which files differ; empty: bit-equal."""


def kills(work: Path, count: int, seed: int, workers: int) -> Iterator[Found]:
    """Disturbs runs until so many were killed; `work` is what `prepare` wrote."""
    seconds = dict(spread(partial(_undisturbed, work), RUNS, workers))
    draw, number, killed = random.Random(seed), 0, 0
    while killed < count:
        trials: list[Trial] = []
        while sum(len(trial.moments) for trial in trials) < count - killed:
            trials.append(_draw(draw, number := number + 1))
        for found in spread(partial(_disturb, work, seconds), trials, workers):
            killed += len(found.phases)
            yield found


def _draw(draw: random.Random, number: int) -> Trial:
    moments = [draw.random()]
    while draw.random() < AGAIN:
        moments.append(draw.random())
    return Trial(number, draw.choice(RUNS), tuple(moments))


def undisturbed(work: Path, run: Run) -> Path:
    """The folder that every disturbed run is compared with."""
    return work / f"{run.name}-undisturbed"


def _undisturbed(work: Path, run: Run) -> tuple[str, float]:
    """Its name, and the seconds that it takes."""
    ended = run.finish(work, undisturbed(work, run))
    assert not any(outcome.code for outcome in ended), ended
    return run.name, ended[0].seconds


def _disturb(work: Path, seconds: dict[str, float], trial: Trial) -> Found:
    output, phases = work / f"killed-{trial.number}", []
    for moment in trial.moments:
        if not _kill(trial.run, work, output, moment * seconds[trial.run.name]):
            break  # it was complete before
        phases.append(phase(output))
    faults = resume(trial.run, work, output)
    return Found(trial, tuple(phases), faults)


def _kill(run: Run, work: Path, output: Path, seconds: float) -> bool:
    """Whether the run still ran by then, and was killed."""
    first, *others = run.start(work, output)
    alive = not first.wait(seconds)
    first.kill()
    time.sleep(LEAVE * (seconds % 1) if others else 0)  # any moment, the same at every call
    for other in others:
        other.kill()
    for child in (first, *others):
        child.end(60)
    return alive


def resume(run: Run, work: Path, output: Path) -> tuple[str, ...]:
    """Runs it to its end, compares, and removes what is as it has to be."""
    faults = tuple(
        f"exit code {outcome.code}: {outcome.told[-1:]}"
        for outcome in run.finish(work, output)
        if outcome.code != 0
    )
    faults = faults or tuple(differences(undisturbed(work, run), output))
    if not faults:
        shutil.rmtree(output)
    return faults


def report(found: list[Found]) -> Iterator[str]:
    """Lines for a reader."""
    phases = Counter(f"{each.trial.run.name}: {one}" for each in found for one in each.phases)
    unequal = [each for each in found if each.faults]
    yield f"{phases.total()} kills of {len(found)} runs: {len(found) - len(unequal)} resumed to"
    yield f"  bit-equal folders, {len(unequal)} did not"
    for name, count in sorted(phases.items()):
        yield f"  {count:4} {name}"
    for each in unequal:
        yield f"  FAULT in killed-{each.trial.number} ({each.trial.run.name}), killed in "
        yield f"    {', '.join(each.phases)}: {'; '.join(each.faults)}"
