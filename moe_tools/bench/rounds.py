"""Rounds of a benchmark: what is compared takes turns, so that a busy moment meets all of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def in_turn(measures: Sequence[Callable[[], T]], rounds: int, *, warm_up: int) -> list[list[T]]:
    """Calls all measures in turn, round by round.

    Args:
        measures: what is compared.
        rounds: how many count.
        warm_up: rounds before those, which fill caches, allocators and page tables.

    Returns:
        For each measure, what it returned in every round that counts.
    """
    kept: list[list[T]] = [[] for _ in measures]
    for number in range(warm_up + rounds):
        for measure, own in zip(measures, kept, strict=True):
            found = measure()
            if number >= warm_up:
                own.append(found)
    return kept


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over / under, round by round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
