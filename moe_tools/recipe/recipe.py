"""Steps in order, and the text they share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import yaml
from transformers import PreTrainedModel

from moe_tools.registry import Registry
from moe_tools.steps.attach import Attach
from moe_tools.steps.budget import Budget
from moe_tools.steps.fit import Fit
from moe_tools.steps.quantize import Quantize
from moe_tools.steps.refit import Refit
from moe_tools.steps.select import Select
from moe_tools.steps.split import Split
from moe_tools.steps.step import Step
from moe_tools.steps.swap import Swap
from moe_tools.steps.threshold import Threshold
from moe_tools.training.train import Train

STEPS: Registry[type[Step]] = Registry(
    "step",
    {
        kind.verb: kind
        for kind in (Swap, Quantize, Split, Attach, Fit, Budget, Refit, Threshold, Train, Select)
    },
)
"""Verb in YAML -> its class. A new step is its file and a word here."""


@dataclass(frozen=True)
class Recipe:
    """Steps in order, and the text they share."""

    name: str
    steps: tuple[Step, ...]
    model: str | None = None
    """The donor it was tuned on; any model of a supported family can be given instead."""
    paper: str = ""
    data: str = "docs"
    """Training text: `docs`, a file or folder, a hub dataset, or `self`; to classify, a .jsonl or
    .parquet file with the columns text and label. `FILE:COLUMN` names another one."""
    task: Literal["lm", "classify"] = "lm"
    """What the loss `lm` is the cross entropy of: the next token, or the label of a whole text."""
    block_length: int = 512
    """Tokens of a block; of a text to classify, at most. A run makes it the donor's context, if
    that is shorter."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"recipe {self.name}: no steps")
        if self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}, but must be at least 1")
        for step in self.steps:
            step.check()

    @property
    def train_steps(self) -> tuple[Train, ...]:
        """The steps that train the whole model."""
        return tuple(step for step in self.steps if isinstance(step, Train))

    def train_tokens(self) -> int:
        """Tokens of all train steps together."""
        return sum(step.tokens for step in self.steps if step.trains)

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Does every step in order without text or training, on weights that may be empty.

        Args:
            model: the donor; it ends with the modules that the real steps would give it.
            donor: its name, as the conversion will keep it.

        Raises:
            ValueError: as the steps themselves, where it does not depend on the text.
        """
        for step in self.steps:
            step.rehearse(model, donor)

    def to_yaml(self) -> str:
        """The recipe as it can be read again: every default spelled out."""
        block = {key: value for key, value in asdict(self).items() if key != "steps"}
        block["steps"] = [{step.verb: step.options()} for step in self.steps]
        return yaml.safe_dump(block, sort_keys=False)
