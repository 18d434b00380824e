"""Encodes documents in several processes, in their order, with a bound on what is under way.

A tokenizer's own threads share one Python, which makes lists of their ids: some millions of tokens
a second, whatever the number of cores. Processes are forked, as `datasets` does it: they inherit
the tokenizer, and touch nothing else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult

from moe_tools import processes
from moe_tools.data.pieces import Encoder, Piece

AHEAD = 4
"""Batches of each process that are encoded before they are asked for."""
FEW = 4
"""Cores of a run's process from which others pay: below, the tokenizer's threads are as fast."""

_encoder: Encoder | None = None
"""In a forked process, what it inherited."""


def workers() -> int:
    """Processes that a process of this run may fork: the cores are shared by all of them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    own = cores // int(os.environ.get("LOCAL_WORLD_SIZE", str(processes.count())))
    return own if own >= FEW else 1


def encoded(
    encoder: Encoder, batches: Iterable[list[str]], count: int
) -> Iterator[tuple[list[Piece], int]]:
    """The pieces of each batch and how many documents it had, in order.

    Args:
        encoder: makes the pieces.
        batches: read as results are asked for, `AHEAD` a process before.
        count: processes; 1: this one.

    Raises:
        ValueError: as the encoder.
    """
    if count == 1:
        for batch in batches:
            yield encoder(batch), len(batch)
        return
    global _encoder
    _encoder = encoder
    try:
        pool = get_context("fork").Pool(count, initializer=_alone)
    finally:
        _encoder = None
    pending: deque[tuple[AsyncResult[list[Piece]], int]] = deque()
    with pool:
        for batch in batches:
            pending.append((pool.apply_async(_encode, (batch,)), len(batch)))
            if len(pending) > AHEAD * count:
                result, size = pending.popleft()
                yield result.get(), size
        for result, size in pending:
            yield result.get(), size


def _alone() -> None:
    """A forked process has no use for threads of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode(batch: list[str]) -> list[Piece]:
    assert _encoder is not None
    return _encoder(batch)
