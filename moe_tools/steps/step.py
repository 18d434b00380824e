"""What a step of a recipe is: its options, and everything that a run asks of it.

A step is a frozen dataclass whose fields are its options in YAML. All that depends on the kind of
a step is a method here: a run, a stream and a dry run never ask which kind it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from transformers import PreTrainedModel

from moe_tools.data import Blocks, Text
from moe_tools.measure.memory import ModelStates, Teacher
from moe_tools.steps.launch import Launch

NO_TEXT = torch.empty(0, 1, dtype=torch.long)

Option = Literal["target_sparsity", "expert_size", "tokens", "epochs"]
"""What a command line can change in the steps of a recipe."""


def _nothing_held_out(tokens: int) -> Text:
    raise ValueError(f"{tokens} tokens of held-out text are asked for, and there is none")


@dataclass(frozen=True)
class Work:
    """What a run gives to one of its steps."""

    folder: Path
    """For what the step cannot keep in memory; removed once the step is complete."""
    donor: str
    """The dense model that all started from: folder, hub id or GGUF file."""
    seed: int
    calibration: Callable[[int], Blocks]
    """blocks_BT, or rows of a task, of about so many tokens of training text."""
    training: Callable[[], Text]
    """The training text of this step, in the order in which it is seen."""
    teacher: Callable[..., PreTrainedModel]
    """Loads the dense model that losses compare with, on a device; meta: without its weights."""
    launch: Launch = field(default_factory=Launch)
    held_out: Callable[[int], Text] = _nothing_held_out
    """Held-out text of about so many tokens, which nothing may train on or be chosen by."""
    teacher_source: Callable[[], str] = str
    """Where the teacher is: folder, hub id or GGUF file."""
    weights: str | None = None
    """Where the weights are of a model that comes empty, to be read in shards; None: it has them.
    After the step, the first process alone has them then."""


@dataclass(frozen=True)
class Setting:
    """What the cost of a step depends on beside the model."""

    block_length: int
    """Tokens."""
    processes: int
    """That train together."""
    teacher_bytes: int
    """Weights of the donor."""


@dataclass(frozen=True)
class Cost:
    """What a step takes beside its text, told from shapes alone."""

    optimizer_steps: int = 0
    trained: int = 0
    """Parameters that it trains with gradients through the whole model."""
    flops: float = 0.0
    """FLOPs of a train step, forward and backward, the teacher included, every neuron on."""
    disk: int = 0
    """Bytes that are cached while it runs: activations of `fit`, a teacher's probabilities."""
    states: ModelStates | None = None
    """What a train step holds in memory."""
    activations: int = 0
    """Bytes that one pass of a train step keeps for its backward pass, without logits."""
    recomputed: int = 0
    """The same, if every layer is computed again in the backward pass."""
    logits: int = 0
    """Bytes of its logits and their gradients, a teacher's too."""
    passes: int = 1
    """Forward passes of one optimizer step, in each process."""
    step_tokens: int = 0
    """Tokens of one optimizer step, of all processes."""
    teacher: Teacher = "whole"
    """Where the donor is, if a loss needs it."""


class Step(ABC):
    """One verb of a recipe."""

    verb: ClassVar[str]
    """What it is called in YAML."""
    trains: ClassVar[bool] = False
    """It takes gradient steps through the whole model: all processes take part, and its tokens are
    training text, of which each step sees its own part. The tokens of other steps calibrate."""
    changes_function: ClassVar[bool] = False
    """After it the model computes something else: a teacher is the model from before."""
    whole_model: ClassVar[str | None] = None
    """Why it cannot run layer by layer with one layer in memory; None: it can."""

    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields of which a recipe has to name one, though each has a default."""

    tokens: int
    """Tokens of text that it reads."""

    @property
    def amount(self) -> float:
        """How much text it reads, in tokens or in what a train step counts in place of them."""
        return self.tokens

    @abstractmethod
    def check(self) -> None:
        """Checks ranges that a type cannot express (`moe_tools.steps.rules`).

        Raises:
            ValueError: the key, its value and the rule.
        """

    def takes(self, option: Option) -> bool:
        """Whether the command line's option changes the field of that name."""
        return False

    def changed(self, option: Option, value: Any) -> Self:
        """The step under an option that it takes."""
        return replace(self, **{option: value})  # type: ignore[type-var]

    def control(self) -> Self | None:
        """What the dense control does instead: the same training without routers; None: nothing."""
        return None

    def needs_text(self) -> bool:
        """Whether it looks at activations; a step that does not works from the weights alone."""
        return True

    @abstractmethod
    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Does what can be done without text and training, in place, on weights that may be empty.

        Every mistake that words alone can make shows here. Afterwards the model has the modules
        that the real step would give it, with numbers that mean nothing.

        Raises:
            ValueError: as `apply`, where that does not depend on the text.
        """

    @abstractmethod
    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Does the step, in place, on a whole model or on a part with a layer in it.

        Returns:
            What it measured, as JSON takes it.

        Raises:
            ValueError: a model that the step cannot be done to, or too little text.
        """

    def merge(self, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Joins what `apply` measured of each layer; figures go by the names of FFNs."""
        merged: dict[str, dict[str, Any]] = {}
        for layer in measured:
            for kind, found in layer.items():
                merged[kind] = {**merged.get(kind, {}), **found}
        return merged

    def cost(self, model: PreTrainedModel, setting: Setting) -> Cost:
        """What it takes on a rehearsed model; by default nothing that is worth a column."""
        return Cost()

    def options(self) -> dict[str, Any]:
        """Its fields as plain data, every default spelled out."""
        return asdict(self)  # type: ignore[call-overload]  # every step is a dataclass

    def text(self, work: Work) -> Blocks:
        """Calibration blocks_BT, empty where it needs none."""
        return work.calibration(self.tokens) if self.needs_text() else NO_TEXT
