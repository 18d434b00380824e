"""What each loss weighs in each optimizer step: a number, stages, or what a controller says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_tools.steps.schedules import weight_at
from moe_tools.training.controller import DRIVEN, WeightController

if TYPE_CHECKING:
    from moe_tools.training.train import Train


class LossWeights:
    """The weights of a train step's losses, as they are now."""

    def __init__(self, step: Train) -> None:
        self.given = step.losses
        self.now: dict[str, float] = {}
        """Name of a loss -> its weight in the optimizer step that was entered last."""
        driven = None if step.target_sparsity is None else DRIVEN.get(step.drive)
        if step.mode == "hard":  # its routers are frozen: no loss moves them
            driven = None
        self.driven = None if driven is None else driven.loss
        self.controller: WeightController | None = None
        if driven is not None:
            start = self.given.get(driven.loss, driven.start)
            assert not isinstance(start, tuple)
            self.controller = WeightController(start, driven.bounds)

    def enter(self, step: int, steps: int) -> None:
        """Sets the weights of one optimizer step, counted from 1."""
        self.now = {name: weight_at(weight, step, steps) for name, weight in self.given.items()}
        if self.driven is not None and self.controller is not None:
            self.now[self.driven] = self.controller.weight

    def state(self) -> list[float] | None:
        """Returns what the controller knows, for a checkpoint."""
        return None if self.controller is None else [self.controller.weight, self.controller.error]

    def resume(self, state: list[float] | None) -> None:
        """Sets the controller to what `state` returned."""
        if self.controller is not None and state is not None:
            self.controller.weight, self.controller.error = state

    def moving(self) -> dict[str, float]:
        """Returns the weights that change from step to step, for the log, e.g. `l1_weight`."""
        staged = {name for name, weight in self.given.items() if isinstance(weight, tuple)}
        return {
            f"{name}_weight": weight
            for name, weight in self.now.items()
            if name in staged or name == self.driven
        }
