"""What a stage is given, and how it says that it cannot run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
"""One thing that a stage found, as JSON has it."""


class Skip(Exception):
    """A stage, or a part of it, cannot run here: says why, in one line."""


@dataclass
class Context:
    """Where a stage runs, for how long, and how far it came."""

    device: str
    """cuda, or cpu in a dry run."""
    deadline: float
    """Of time.monotonic; a unit that has begun may end behind it."""
    out: Path
    """The folder of all files."""
    table: Path | None = None
    """Tiles and limits of an earlier run, which are in force."""
    done: int = 0
    """Units that ended."""
    total: int = 0

    @property
    def dry(self) -> bool:
        """Whether kernels are interpreted on a CPU, and nothing is timed."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def within(self, units: Sequence[T]) -> Iterator[T]:
        """Yields units until the deadline is reached, and counts those that ended."""
        self.total += len(units)
        for unit in units:
            if self.left <= 0:
                return
            yield unit
            self.done += 1

    @property
    def stopped(self) -> str | None:
        """How far it came where the deadline came first."""
        if self.done == self.total:
            return None
        return f"stopped at the limit: {self.done} of {self.total} done"

    def need(self, size: float, what: str) -> None:
        """Checks that the card has memory for `size` more bytes.

        Raises:
            Skip: it has not.
        """
        if self.dry:
            return
        import torch

        free, _ = torch.cuda.mem_get_info()
        if size > free:
            raise Skip(f"{what} needs {size / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
