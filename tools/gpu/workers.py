"""Processes that share out units of work by name: what one compiles, Triton's cache on disk keeps.

A kernel that reads where it must not takes its whole process with it. So each unit is asked for
alone, and a process that dies costs the unit that it had.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from tools.gpu.context import Context, Row
from tools.gpu.stages import first_line

MOST = 12
"""Processes; each compiles on a core of its own."""
MEMORY = 6 << 30
"""Bytes of the card that one of them needs, its largest case included."""


def share_out(names: Sequence[str], count: int, context: Context) -> Iterator[Row]:
    """Yields the row of each unit as it ends; one that is not done at the deadline has none.

    Args:
        names: of units, as `work` knows them; taken in this order.
        count: processes.
        context: its deadline ends all of them.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    found: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
    pool = [_Worker(waiting, found, context) for _ in range(min(count, len(names)))]
    context.total += len(names)
    running = len(pool)
    try:
        while running:
            try:
                row = found.get(timeout=max(0.1, context.left))
            except queue.Empty:
                if context.left <= 0:
                    return
                continue
            if row is None:
                running -= 1
                continue
            context.done += 1
            yield row
    finally:
        for worker in pool:
            worker.stop()


class _Worker(threading.Thread):
    """Feeds one process, and starts another where that one dies."""

    def __init__(
        self,
        waiting: queue.SimpleQueue[str],
        found: queue.SimpleQueue[Row | None],
        context: Context,
    ) -> None:
        super().__init__(daemon=True)
        self.waiting, self.found, self.context = waiting, found, context
        self.process: subprocess.Popen[str] | None = None
        self.stopping = False
        self.start()

    def run(self) -> None:
        """Asks for units until there are none."""
        try:
            while not self.stopping and self.context.left > 0:
                name = self.waiting.get_nowait()
                row = self._ask(name)
                if not self.stopping:
                    self.found.put(row)
        except queue.Empty:
            pass
        except Exception as error:  # else the one who waits would wait for ever
            self.found.put({"case": "a worker", "wrong": first_line(error)})
        finally:
            self.stop()
            self.found.put(None)

    def stop(self) -> None:
        """Ends the process."""
        self.stopping = True
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _ask(self, name: str) -> Row:
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
            self.process = _start(self.context.dry, self.errors)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            row: Row = json.loads(answer)
            return row
        code, self.process = self.process.wait(), None
        return {"case": name, "wrong": f"its process died with {code}: {_last_line(self.errors)}"}


def _start(dry: bool, errors: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.gpu", "--worker", *(["--dry-run"] if dry else [])]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    )


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    lines = file.read().strip().splitlines()
    return lines[-1] if lines else "no word"


def work(units: Mapping[str, Callable[[], Row]], names: IO[str], answers: IO[str]) -> None:
    """Runs the units whose names come in, a line each, and answers each with its row.

    A card that is in trouble stays so for the whole process: after an error of CUDA it ends, and
    the unit is the one that it had.
    """
    for name in map(str.strip, names):
        try:
            row = units[name]()
        except Exception as error:  # whatever a kernel or a compiler throws
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise
            row = {"case": name, "wrong": first_line(error), "traceback": traceback.format_exc()}
        print(json.dumps(row), file=answers, flush=True)
