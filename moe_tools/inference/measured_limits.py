"""Measures where matrix products overtake the kernels: once a machine, in about a second.

What was measured is kept in `$XDG_CACHE_HOME/moe_tools/limits.json`, for the CPU, its instruction
set, the number of threads and the version of PyTorch. `MOE_TOOLS_LIMITS=built-in` measures nothing
and takes the tables of `limits.py`. A file of a busy hour may be removed: it is measured again.

Letters: T tokens, D width, F neurons, E experts.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.cached import cache_file, write_cache
from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu import limits
from moe_tools.kernels.cpu.limits import BUILT_IN, TOKENS, Limits, Table
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.weights import FFNWeights

_log = logging.getLogger(__name__)

VARIABLE, FILE = "MOE_TOOLS_LIMITS", "limits.json"
NEURONS, TOGETHER = 2048, 4
"""Of the FFN that is timed, and of its experts: the kernels read four neurons together."""
SHARE = 0.5
"""Of the experts that its tokens want. What the kernels take grows with it, from nothing."""
TRIES = 3
LEAST = 0.05
"""The smallest limit: a clock that was disturbed does not turn the kernels off."""


def use_measured(weights: Iterable[torch.dtype]) -> None:
    """Puts the limits of this machine in force for weights of these dtypes, with x in bf16."""
    wanted = [dtype for dtype in weights if dtype in BUILT_IN]
    if os.environ.get(VARIABLE) == "built-in" or not wanted:
        return
    known = _read()
    began, missing = time.perf_counter(), [one for one in wanted if _key(one) not in known]
    for dtype in missing:
        known[_key(dtype)] = vars(measure(dtype))
        _write(known)
    for dtype in wanted:
        limits.in_force[dtype] = _table(known[_key(dtype)])
    if missing:
        _log.info("measured where dense is faster, in %.1f s", time.perf_counter() - began)


@torch.inference_mode()
def measure(weights: torch.dtype) -> Table:
    """Times both ways on random numbers."""
    narrow, wide = ([_share(weights, width, tokens) for tokens in TOKENS] for width in (512, 2048))
    return _table({"narrow": narrow, "wide": wide})


def _share(weights: torch.dtype, width: int, tokens: int) -> float:
    """The share of pairs at which both ways take as long."""
    drawn = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float32).bfloat16()

    up_FD, gate_FD, down_FD = (random(NEURONS, width) / width**0.5 for _ in range(3))
    ffn = CpuFFN(FFNWeights(up_FD, down_FD, Act("silu"), gate_FD=gate_FD), weights, sole=True)
    x_TD = random(tokens, width)
    mask_TE = torch.rand(tokens, NEURONS // TOGETHER, generator=drawn) < SHARE
    kernel = ffn.kernel
    dense = _seconds(lambda: kernel.run(x_TD, mask_TE, Limits(limits.FEW, 0.0, 0.0)))
    sparse = _seconds(lambda: kernel.run(x_TD, mask_TE, limits.ALWAYS))
    share = float(mask_TE.float().mean()) * dense / sparse
    return round(min(max(share, LEAST), 1.0), 3)


def _seconds(run: Callable[[], object]) -> float:
    run()
    tries = []
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        tries.append(time.perf_counter() - began)
    return min(tries)


def _key(weights: torch.dtype) -> str:
    cpu, threads = _cpu(), torch.get_num_threads()
    return f"{cpu}, {isas()[-1]}, {threads} threads, torch {torch.__version__}, {weights}"


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown CPU"


def _table(written: Any) -> Table:
    narrow, wide = (tuple(map(float, written[name])) for name in ("narrow", "wide"))
    if not all(len(one) == len(TOKENS) and min(one) > 0 for one in (narrow, wide)):
        raise ValueError(f"limits {written!r} are not {len(TOKENS)} shares each")
    return Table(narrow, wide)  # type: ignore[arg-type]


def _read() -> dict[str, Any]:
    """What `_write` wrote, and can be read; the rest is measured again."""
    with suppress(OSError, ValueError):
        found = json.loads(cache_file(FILE).read_text(encoding="utf-8"))
        known = {}
        for key, written in found.items() if isinstance(found, dict) else ():
            with suppress(ValueError, TypeError, KeyError):
                known[key] = vars(_table(written))
        return known
    return {}


def _write(known: dict[str, Any]) -> None:
    """Where nothing can be written, the next process measures again."""
    with suppress(OSError):
        write_cache(cache_file(FILE), json.dumps(known, indent=1))
