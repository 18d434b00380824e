"""Steps in order, and the text they share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import yaml

from moe_tools.recipe.rules import check_step
from moe_tools.recipe.step import Step, Train, step_name


@dataclass(frozen=True)
class Recipe:
    """Steps in order, and the text they share."""

    name: str
    steps: tuple[Step, ...]
    model: str | None = None
    """The donor it was tuned on; any model of a supported family can be given instead."""
    paper: str = ""
    data: str = "docs"
    """Training text: `docs`, a file or folder, a hub dataset, or `self`; to classify, a .jsonl
    file with the fields text and label."""
    task: Literal["lm", "classify"] = "lm"
    """What the loss `lm` is the cross entropy of: the next token, or the label of a whole text."""
    block_length: int = 512
    """Tokens of a block; of a text to classify, at most."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"recipe {self.name}: no steps")
        if self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}, but must be at least 1")
        for step in self.steps:
            check_step(step)

    def train_tokens(self) -> int:
        """Tokens of all train steps together."""
        return sum(step.tokens for step in self.steps if isinstance(step, Train))

    def to_yaml(self) -> str:
        """The recipe as it can be read again: every default spelled out."""
        block = {key: value for key, value in asdict(self).items() if key != "steps"}
        block["steps"] = [{step_name(step): asdict(step)} for step in self.steps]
        return yaml.safe_dump(block, sort_keys=False)
