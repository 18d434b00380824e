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
    """All units by name, in order: the usual cases, the kernels of other stages, rare cases."""
    device = "cpu" if dry else "cuda"
    own = cases(dry, [] if dry else look().lacks)
    checks, late = (
        {case.name: partial(check, case, device) for case in own if case.rare == rare}
        for rare in (False, True)
    )
    compiles: Units = {} if dry else _compiles()
    return checks | compiles | late


def _compiles() -> Units:
    from tools.gpu import speed, tiles  # these need transformers, which takes seconds

    calls = speed.kernels() | tiles.kernels()
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
