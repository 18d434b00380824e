"""What a train step shows while it runs, and when it is told that an optimizer step is over."""

from __future__ import annotations

from typing import Any, Protocol

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl

from moe_tools import processes


class Stepping(Protocol):
    """What `Progress` calls when an optimizer step begins and ends."""

    last: dict[str, float]

    def begin(self) -> None:
        """Is called before the first optimizer step, also after a resume."""

    def enter_step(self, step: int, steps: int) -> None:
        """Is called before an optimizer step, counted from 1."""

    def end_step(self) -> None:
        """Is called after an optimizer step."""

    def steer(self, control: TrainerControl) -> None:
        """Is called then, and may ask for a log, a checkpoint or the end."""


class Progress(TrainerCallback):
    """Tells a trainer when a step begins and ends, and shows the progress on a terminal."""

    def __init__(self, trainer: Stepping, name: str) -> None:
        self.trainer, self.name = trainer, name
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the trainer and the bar, where a checkpoint stopped."""
        self.trainer.begin()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            disable=None if processes.rank() == 0 else True,  # None: only on a terminal
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the trainer that an optimizer step begins."""
        self.trainer.enter_step(state.global_step + 1, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the trainer that an optimizer step is done, and shows its figures."""
        self.trainer.end_step()
        self.trainer.steer(control)
        self.bar.update()
        self.bar.set_postfix_str(in_words(self.trainer.last))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.bar.close()


def in_words(figures: dict[str, float]) -> str:
    """Returns the figures as text, each with four digits; thousands are whole numbers."""
    return "  ".join(f"{name} {_in_words(value)}" for name, value in figures.items())


def _in_words(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
