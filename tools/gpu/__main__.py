"""Everything that only a GPU can say, in one command and a few minutes.

    python -m tools.gpu [--minutes 8] [--out gpu] [--only STAGE ...] [--table FILE] [--dry-run]

Stages run in order of their worth, each in a process of its own, so that none takes another one's
memory or card down with it. Each writes DIR/a.json ... after every row, and the page comes last, on
standard output and in DIR/page.md. It exits with 1 where a stage failed or a number is wrong, and
with 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tools.gpu.card import look
from tools.gpu.context import Context
from tools.gpu.page import page
from tools.gpu.stages import BY_NAME, STAGES, Result, Stage, run_stage
from tools.gpu.workers import work

GRACE = 20
"""Seconds that a stage may go on behind its limit, for the unit that it has begun."""
LAST = 5
"""Seconds for the page."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages, or in a process that was started for it a part of one."""
    options = _parse(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    if options.dry_run:
        _interpret()
    if options.worker:
        return _work(options.dry_run)
    if options.sanitized:
        from tools.gpu.sanitize import calls

        calls(options.dry_run)
        return 0
    if options.stage is not None:
        return _one(options)
    refusal = _refusal(options)
    if refusal is not None:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    return _all(options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description="what only a GPU can say: correctness, speed, tiles, models, training, races",
    )
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="of all stages (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder (default: gpu)")
    parser.add_argument("--only", nargs="+", choices=[*BY_NAME], help="stages; default: all")
    parser.add_argument("--table", type=Path, help="tiles and limits of an earlier run")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="interpret tiny cases of every stage on the CPU; nothing is timed",
    )
    for name in ("--worker", "--sanitized"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=[*BY_NAME], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _minutes(word: str) -> float:
    minutes = float(word) if word.replace(".", "", 1).isdigit() else 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is no number of minutes above 0")
    return minutes


def _interpret() -> None:
    """Lets Triton interpret; it asks when it is first imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ModuleNotFoundError):
        import triton

        # Written down, for torch.compile cannot trace a look into the environment.
        triton.knobs.runtime.interpret = True


def _refusal(options: argparse.Namespace) -> str | None:
    """Why nothing can run, in one line; None: something can."""
    card = look()
    if card.refusal is not None and not (options.dry_run and card.triton is not None):
        return card.refusal
    if options.table is not None:
        from moe_tools.kernels.triton.limits import read

        try:
            read(options.table)
        except OSError as error:
            return f"--table {options.table} cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for stage in _chosen(options):  # what it had found in another run
            (options.out / f"{stage.letter}.json").unlink(missing_ok=True)
    except OSError as error:
        return f"--out {options.out} cannot be written: {error.strerror}"
    return None


def _chosen(options: argparse.Namespace) -> list[Stage]:
    """The stages that were asked for, in their order."""
    return [stage for stage in STAGES if options.only is None or stage.name in options.only]


def _all(options: argparse.Namespace) -> int:
    """Runs the stages one after the other, and prints the page."""
    end = time.monotonic() + 60 * options.minutes - LAST
    # The stages are sessions of their own, and end only where this process sees its own end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = _chosen(options)
    for index, stage in enumerate(chosen):
        weights = [one.weight for one in chosen[index:]]
        seconds = (end - time.monotonic()) * weights[0] / sum(weights)
        print(f"{stage.letter}. {stage.title} ...", file=sys.stderr, flush=True)
        _run(stage.name, max(0.0, seconds), end - time.monotonic(), options)
    results = [Result.load(options.out, stage) for stage in chosen]
    card = look()
    title = card.title
    if card.lacks:
        title += f"; it does not compute {', '.join(card.lacks)}, which is left out"
    made = page(title, results, options.dry_run)
    (options.out / "page.md").write_text(made)
    print(made)
    return 1 if any(result.failed for result in results) else 0


def _run(name: str, seconds: float, most: float, options: argparse.Namespace) -> None:
    """Runs a stage in a process, which is killed where it does not see its limit."""
    command = [sys.executable, "-m", "tools.gpu", "--stage", name, "--seconds", str(seconds)]
    command += ["--out", str(options.out)]
    command += ["--dry-run"] if options.dry_run else []
    command += ["--table", str(options.table)] if options.table is not None else []
    with tempfile.TemporaryFile("w+") as words:
        # A session of its own: all that it starts ends with it.
        process = subprocess.Popen(
            command, stdout=words, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=max(1.0, min(seconds + GRACE, most)))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result = Result.load(options.out, BY_NAME[name])
        if code is None:
            result.stopped = result.stopped or "stopped at the limit, in the midst of a unit"
        elif code or not result.ended:
            result.error = f"its process ended with {code}"
            result.traceback = _tail(words)
        result.save(options.out)


def _tail(words: IO[str]) -> str:
    words.seek(0)
    return "\n".join(words.read().strip().splitlines()[-40:])


def _one(options: argparse.Namespace) -> int:
    """Runs one stage here."""
    if options.table is not None:
        from moe_tools.kernels.triton.limits import put_in_force, read

        put_in_force(read(options.table))
    device = "cpu" if options.dry_run else "cuda"
    deadline = time.monotonic() + options.seconds
    run_stage(BY_NAME[options.stage], Context(device, deadline, options.out, options.table))
    return 0


def _work(dry: bool) -> int:
    """Answers the names of units on standard input; whatever else is printed goes to errors."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from tools.gpu.correct import units

    work(units(dry), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
