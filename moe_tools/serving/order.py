"""One text to continue, between the event loop that took it and the thread that computes it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_tools.serving.sampling import Sampling
from moe_tools.serving.sparsity import Count

NOTHING = Count()


class End(NamedTuple):
    """Behind the last token."""

    error: str | None = None
    """Why it ended early; None: it did not."""


@dataclass(eq=False)
class Order:
    """What to continue, and how. It is made in the event loop, and told tokens by any thread."""

    name: str
    """Unique."""
    prompt: list[int]
    new: int
    """Tokens at most."""
    ends: frozenset[int]
    """Tokens that end a text."""
    sampling: Sampling
    came: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    """Whether nobody waits for it any more."""
    given: int = 0
    """Tokens told so far; of the thread that computes."""
    alone: bool = True
    """Whether nothing else ran meanwhile."""
    counted: Count = NOTHING
    """Neurons while it ran; known when it has ended."""
    heard: asyncio.Queue[int | End] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def tell(self, token: int) -> None:
        """Hands a token to the event loop."""
        self.given += 1
        self._put(token)

    def end(self, error: str | None = None) -> None:
        """Says that no more tokens come."""
        self._put(End(error))

    def _put(self, what: int | End) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there
            self.loop.call_soon_threadsafe(self.heard.put_nowait, what)
