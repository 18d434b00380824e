"""Runs in processes of their own, forked from one that has imported everything already.

The parent has one thread and no pool of OpenMP's: `OMP_NUM_THREADS` is 1 before torch is imported,
and whatever trains or computes does so in a child.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """What became of a child."""

    code: int | None
    """Its exit code, a negative signal, or None: it was stopped for taking too long."""
    err: str
    """What it said on standard error."""
    seconds: float

    @property
    def told(self) -> list[str]:
        """Lines of standard error."""
        return self.err.splitlines()


@dataclass
class Child:
    """A process that was forked from this one."""

    pid: int
    err: Path
    began: float

    def wait(self, seconds: float) -> bool:
        """Waits at most so long, and says whether it has ended."""
        handle = os.pidfd_open(self.pid)
        try:
            return bool(select.select([handle], [], [], max(0.0, seconds))[0])
        finally:
            os.close(handle)

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self, seconds: float) -> Outcome:
        """Waits for its end, kills it when the time is over, and collects it."""
        late = not self.wait(seconds)
        if late:
            self.kill()
        _, status = os.waitpid(self.pid, 0)
        err = self.err.read_text(errors="replace")
        self.err.unlink()
        code = None if late else os.waitstatus_to_exitcode(status)
        return Outcome(code, err, time.monotonic() - self.began)


def fork(
    work: Callable[[], int | None],
    *,
    env: Mapping[str, str] | None = None,
    memory: int | None = None,
    cpu: int | None = None,
) -> Child:
    """Starts `work` in a child; its exit code is what `work` returns, None is 0.

    Args:
        work: an exception of it is a traceback on standard error and exit code 1.
        env: added to the environment.
        memory: bytes of address space beyond those that it begins with; None: without a limit.
        cpu: seconds of computing, after which it is ended by SIGXCPU; None: without a limit.
    """
    descriptor, name = tempfile.mkstemp(prefix="faults-", suffix=".err")
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return Child(pid, Path(name), began)
    code = 1
    try:  # nothing may return from here into the parent's program
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace")  # as Python begins
        os.environ.update(env or {})
        if memory is not None:
            limit = _address_space() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if cpu is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        code = work() or 0
    except BaseException:  # SystemExit, too: nothing of ours calls it
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_child(work: Callable[[], int | None], *, seconds: float = 300, **options: Any) -> Outcome:
    """`work` in a child, to its end."""
    return fork(work, **options).end(seconds)


def spread(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """What `work` returns for every item, done by so many forked processes, as it comes.

    They inherit work and items, which so may be closures; only what is returned is pickled.
    """
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _inherit, (work, items)) as pool:
        yield from pool.imap_unordered(_do, range(len(items)))


_inherited: list[Any] = []
"""In a process of `spread`: the work and its items."""


def _inherit(*given: Any) -> None:
    _inherited[:] = given


def _do(index: int) -> Any:
    work, items = _inherited
    return work(items[index])
