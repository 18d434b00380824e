"""Stage a: every kernel variant against the reference; what the other stages run is compiled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial

from tools.gpu.card import look
from tools.gpu.cases import cases
from tools.gpu.check import check
from tools.gpu.context import Context, Row
from tools.gpu.workers import MEMORY, MOST, share_out

Units = dict[str, Callable[[], Row]]


def run(context: Context) -> Iterator[Row]:
    """Yields a row for each case, and one for what was compiled for other stages."""
    began, compiled = time.monotonic(), 0
    for row in share_out([*units(context.dry)], _processes(context.dry), context):
        if row.get("compiled"):
            compiled += 1
        else:
            yield row
    seconds = {} if context.dry else {"seconds": time.monotonic() - began}
    yield {"case": "compiled for the stages behind", "compiled": compiled, **seconds}


def units(dry: bool) -> Units:
    """All units by name, in order: usual cases, what stage b runs, rare cases, what c runs."""
    device = "cpu" if dry else "cuda"
    own = cases(dry, [] if dry else look().lacks)
    checks: Units = {case.name: partial(check, case, device) for case in own if not case.rare}
    late: Units = {case.name: partial(check, case, device) for case in own if case.rare}
    if dry:
        return checks | late
    from tools.gpu import speed, tiles  # these need transformers, which takes seconds

    return checks | _compiles(speed.kernels()) | late | _compiles(tiles.kernels())


def _compiles(calls: dict[str, Callable[[], object]]) -> Units:
    return {name: partial(_compile, name, call) for name, call in calls.items()}


def _compile(name: str, call: Callable[[], object]) -> Row:
    """Makes a call, for what it compiles."""
    call()
    return {"case": name, "compiled": True}


def _processes(dry: bool) -> int:
    cores = len(os.sched_getaffinity(0))
    if dry:
        return min(2, cores)
    return max(1, min(MOST, cores, look().free // MEMORY))
