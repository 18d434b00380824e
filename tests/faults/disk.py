"""Runs on a disk that is full at a random moment, and then resumed with room enough."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.children import spread
from tests.faults.kills import resume, undisturbed
from tests.faults.runs import COMPLETE, RUNS, Run, phase

ROOM = 256 << 20
"""Bytes: more than any run takes."""
PAGE = 4096
"""A tmpfs is so many bytes at least: a size of 0 is without a limit."""


@dataclass(frozen=True)
class Trial:
    """One run to put on a small disk."""

    number: int
    run: Run
    share: float
    """Of the space that it takes at its largest."""


@dataclass(frozen=True)
class Found:
    """What came of a trial."""

    trial: Trial
    phase: str
    """How far the run came; complete: there was room enough."""
    said: str
    """Its last line."""
    faults: tuple[str, ...]


def can_mount() -> bool:
    """Whether this user may mount a disk of its own."""
    try:
        with _disk():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def full_disks(work: Path, count: int, seed: int, workers: int) -> Iterator[Found]:
    """Runs on so many small disks; `work` is what `prepare` wrote."""
    takes = dict(spread(partial(_measure, work), RUNS, workers))
    draw = random.Random(seed)
    trials = [Trial(number, draw.choice(RUNS), draw.random()) for number in range(count)]
    return spread(partial(_fill, work, takes), trials, workers)


def _measure(work: Path, run: Run) -> tuple[str, int]:
    """The name of a run, and the bytes that it takes at most; its folder is what others equal."""
    largest = 0
    with _disk() as disk:
        children = run.start(work, disk / "out")
        while not children[0].wait(0.002):
            largest = max(largest, _used(disk))
        assert not any(child.end(60).code for child in children)
        if not undisturbed(work, run).exists():
            subprocess.run(["cp", "-r", disk / "out", undisturbed(work, run)], check=True)
    return run.name, largest


def _used(disk: Path) -> int:
    state = os.statvfs(disk)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def _fill(work: Path, takes: dict[str, int], trial: Trial) -> Found:
    with _disk() as disk:
        _resize(disk, max(PAGE, round(trial.share * takes[trial.run.name])))
        first, *_ = trial.run.finish(work, disk / "out")
        reached, said = phase(disk / "out"), (first.told or [""])[-1]
        faults = []
        if "Traceback" in first.err:
            faults.append(f"a traceback: {said}")
        elif first.code not in ((0,) if reached == COMPLETE else (1, 2)):
            faults.append(f"exit code {first.code}: {said}")
        elif first.code and not said.startswith("moe-tools: "):
            faults.append(f"no line of ours at the end: {said}")
        _resize(disk, ROOM)
        faults += resume(trial.run, work, disk / "out")
    return Found(trial, reached, said, tuple(faults))


@contextmanager
def _disk() -> Iterator[Path]:
    """A small disk in memory, mounted while it lasts."""
    with tempfile.TemporaryDirectory(prefix="faults-disk-") as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder]
        subprocess.run(command, check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True, capture_output=True)


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True, capture_output=True)


def report(found: list[Found]) -> Iterator[str]:
    """Lines for a reader."""
    full = [each for each in found if each.phase != COMPLETE]
    bad = [each for each in found if each.faults]
    yield f"{len(found)} small disks, {len(full)} of them full: {len(bad)} faults"
    for each in sorted(full, key=lambda each: (each.trial.run.name, each.phase)):
        yield f"  {each.trial.run.name}: {each.phase}: {each.said}"
    for each in bad:
        yield f"  FAULT {each.trial.run.name}, {each.phase}: {'; '.join(each.faults)}"
