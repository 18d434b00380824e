"""The stages, in order of their worth, and how one runs: its file is written after every row."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu.context import Context, Row, Skip


@dataclass(frozen=True)
class Stage:
    """One stage."""

    letter: str
    """Names its file, DIR/a.json."""
    name: str
    """Names its module, whose function `run` takes a `Context` and yields rows."""
    title: str
    weight: float
    """Its share of the minutes, relative to those of the stages that are still to come."""


STAGES = (
    Stage("a", "correct", "correctness of every kernel; all are compiled here", 190),
    Stage("b", "speed", "one FFN beside cuBLAS", 60),
    Stage("c", "tiles", "the fastest tiles, and up to which share the kernels pay", 70),
    Stage("d", "generate", "tokens a second of whole models", 90),
    Stage("e", "training", "a training step", 20),
    Stage("f", "sanitize", "races and memory, by compute-sanitizer", 40),
)
BY_NAME = {stage.name: stage for stage in STAGES}


@dataclass
class Result:
    """What became of a stage, as its file has it."""

    stage: str
    rows: list[Row]
    seconds: float = 0.0
    ended: bool = False
    """False: it was killed, or is running."""
    stopped: str | None = None
    skipped: str | None = None
    error: str | None = None
    """The first line; below it, the traceback."""
    traceback: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it, or one of its rows, went wrong; of correctness also, whether nothing ran."""
        wrong = self.error is not None or any(row.get("wrong") for row in self.rows)
        asked = self.stage == "correct" and self.skipped is None
        return wrong or (asked and not any("route" in row for row in self.rows))

    def save(self, out: Path) -> None:
        """Writes its file, whole or not at all."""
        path = out / f"{BY_NAME[self.stage].letter}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(vars(self), indent=1))
        new.replace(path)

    @classmethod
    def load(cls, out: Path, stage: Stage) -> Result:
        """Reads its file; a stage without one never began."""
        path = out / f"{stage.letter}.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls(stage.name, [])


def run_stage(stage: Stage, context: Context) -> Result:
    """Runs a stage to its end or to the deadline; what it raises stands in the result."""
    began, result = time.monotonic(), Result(stage.name, [])

    def save() -> None:
        result.seconds, result.stopped = time.monotonic() - began, context.stopped
        result.save(context.out)

    try:
        for row in _rows(stage, context):
            result.rows.append(row)
            save()
    except Skip as reason:
        result.skipped = str(reason)
    except Exception as error:  # whatever it is: the next stage runs
        result.error, result.traceback = first_line(error), traceback.format_exc()
    result.ended = True
    save()
    return result


def _rows(stage: Stage, context: Context) -> Iterator[Row]:
    module: Any = importlib.import_module(f"tools.gpu.{stage.name}")
    yield from module.run(context)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
