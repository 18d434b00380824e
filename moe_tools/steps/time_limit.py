"""How long a run may take, as schedulers give time: it stops in good order, and goes on later.

Imports no torch: the command line catches `TimeIsUp`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from moe_tools import processes


class TimeIsUp(Exception):
    """The time of a run is up: everything that is done is kept, and the same command goes on."""


@dataclass(frozen=True)
class TimeLimit:
    """Says when a run has to stop; one of it serves all steps of a run, and its control."""

    hours: float
    began: float = field(default_factory=time.monotonic)
    """On the clock of `time.monotonic`."""

    def __post_init__(self) -> None:
        if not 0 < self.hours < float("inf"):
            raise ValueError(f"max_hours is {self.hours:g}, but must be a number above 0")

    def is_up(self) -> bool:
        """Whether the time is up in any process; all of them ask together, and hear the same."""
        left = time.monotonic() - self.began < self.hours * 3600
        return not processes.all_agree(left)

    def stopped(self, where: str) -> TimeIsUp:
        """What a run that stops raises.

        Args:
            where: what is done, e.g. "after optimizer step 5 of 9".
        """
        return TimeIsUp(
            f"stopped {where}: the time of the run is up (--max-hours {self.hours:g}); nothing is "
            "lost, and the same command goes on from there"
        )
