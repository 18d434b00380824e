"""Keeps memory that was freed, for the next tensor: on a CPU, where every pass asks for it again.

glibc hands large blocks back to the system as soon as they are free, and each new one then costs a
page fault for every 4 KiB, in which the system writes zeros: a third of the time of a training step
of SmolLM2-135M, and half of Gemma-3-270M's, whose logits take a gigabyte (LOG.md, 2026-11-30).

No torch. Elsewhere than under glibc nothing happens, nor where the user has chosen.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHOICES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""What the names of environment variables begin with by which a user chooses: glibc's own, and
another allocator."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Of malloc.h."""
KEEPING = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20}
"""No block is a mapping of its own, and the heap never shrinks."""
GIVING_BACK = {
    M_MMAP_MAX: 65536,
    M_MMAP_THRESHOLD: 32 << 20,
    M_TRIM_THRESHOLD: 64 << 20,
    M_TOP_PAD: 128 << 10,
}
"""Where glibc's own thresholds, which adapt until one is set, end once a large block was freed."""

_lock = threading.Lock()
_depth = 0


@contextmanager
def keep_freed_memory(device: str) -> Iterator[None]:
    """While it lasts, freed memory stays with the process; afterwards it goes back.

    Args:
        device: type of the device that computes. On others than "cpu" nothing happens: what is
            freed on the host there is the copy of the weights, which nobody asks for again.
    """
    libc = _glibc() if device == "cpu" else None
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _glibc() -> Any:
    """The C library, if it is glibc and the user has not chosen."""
    if any(name.startswith(CHOICES) for name in os.environ):
        return None
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has none of this name
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _enter(libc: Any) -> None:
    """Only the first of several sets it."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _set(libc.mallopt, KEEPING)


def _leave(libc: Any) -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _set(libc.mallopt, GIVING_BACK)
            libc.malloc_trim(0)


def _set(mallopt: Callable[[int, int], int], options: dict[int, int]) -> None:
    for option, value in options.items():
        mallopt(option, value)
