"""Makes one allocation after the other fail inside the native kernels; prints how many did.

Started by test_memory.py with `operator new` replaced: fail_allocations.py LIBRARY CALL THREADS.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

import moe_tools.kernels.cpu.stored as backend
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.weights import FFNWeights

FOREVER = 2**31


class Failing:
    """The extension, of which the calls of one function run out of memory."""

    def __init__(self, native: Any, library: ctypes.CDLL, name: str) -> None:
        self.native, self.library, self.name = native, library, name
        self.calls, self.failed = (0, 0), False

    def __getattr__(self, name: str) -> Any:
        return self.call if name == self.name else getattr(self.native, name)

    def call(self, *args: Any, **options: Any) -> Any:
        self.library.fail_calls(*map(ctypes.c_long, self.calls))
        try:
            return getattr(self.native, self.name)(*args, **options)
        finally:
            self.failed = bool(self.library.stop_failing())


def in_a_new_thread(function: Callable[[], None]) -> None:
    """With none of the memory that a thread keeps for its next call, nor do its OpenMP threads."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def main(library: str, call: str, threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    up_FD, down_FD, gate_FD = torch.randn(3, 200, 70)
    weights = FFNWeights(up_FD, down_FD, "silu", gate_FD)
    x_TD = torch.randn(3 if call == "few" else 40, 70)
    mask_TE = torch.rand(len(x_TD), 50) < 0.5
    native = Failing(
        backend.extension(),
        ctypes.CDLL(library),
        "prepare" if call == "prepare" else "run",
    )
    backend.extension = lambda: native  # type: ignore[assignment]
    native.calls = (FOREVER, FOREVER)
    packed = CpuFFN(weights, torch.float32)
    expected_TD = packed(x_TD, mask_TE)

    def attempt() -> None:
        torch.set_num_threads(threads)
        try:
            made = CpuFFN(weights, torch.float32) if call == "prepare" else packed
            assert torch.equal(made(x_TD, mask_TE), expected_TD)
            assert not native.failed, "an allocation failed, and nobody heard"
        except MemoryError:
            assert native.failed
        failed = native.failed
        native.calls = (FOREVER, FOREVER)
        assert torch.equal(packed(x_TD, mask_TE), expected_TD)
        native.failed = failed

    count = 0
    for last in (lambda n: n, lambda n: FOREVER):
        for n in itertools.count():
            native.calls = (n, last(n))
            in_a_new_thread(attempt)
            if not native.failed:
                break
            count += 1
    print(count)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
