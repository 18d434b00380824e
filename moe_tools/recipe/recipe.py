"""Steps in order, and the text they share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import yaml
from transformers import PreTrainedModel

from moe_tools.data.rows import Bos, Packing
from moe_tools.data.tasks import Task
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
    """Training text: `docs`, a file or folder, a hub dataset, or `self`; of any task but lm, a
    .jsonl or .parquet file with the columns text and label, or source and target. `FILE:COLUMN`
    names another one."""
    task: Task = "lm"
    """What the loss `lm` is of: the next token (lm), the class of a text or a pair of texts
    (classify), its score, by squared error (regress), or what a decoder says about what an encoder
    reads (seq2seq)."""
    block_length: int = 512
    """Tokens of a block; of any task but lm, of a row at most. A run makes it the donor's context,
    if that is shorter."""
    packing: Packing = "joined"
    """How texts share a row: `joined` end to end, a token sees all before it; `isolated`, no token
    sees another text; `padded`, one text a row."""
    bos: Bos = "auto"
    """Whether a row of text begins with BOS: as the tokenizer begins a text, always or never."""
    epoch_tokens: int = 0
    """Tokens of the whole text, for which a plan is made; a run counts them itself."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"recipe {self.name}: no steps")
        if self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}, but must be at least 1")
        if self.epoch_tokens < 0:
            raise ValueError(f"epoch_tokens is {self.epoch_tokens}, but must be 0 or more")
        for step in self.steps:
            step.check()
        if self.task == "regress" and any(step.teacher == "cached" for step in self.train_steps):
            raise ValueError(
                f"recipe {self.name}: teacher cached keeps probabilities, and a regression has "
                "none: use teacher whole"
            )
        reads = {bool(step.epochs) for step in self.train_steps if step.amount}
        if len(reads) > 1:
            raise ValueError(
                f"recipe {self.name}: some train steps count tokens and some epochs: use one of "
                "the two in all of them"
            )

    @property
    def train_steps(self) -> tuple[Train, ...]:
        """The steps that train the whole model."""
        return tuple(step for step in self.steps if isinstance(step, Train))

    @property
    def epochs(self) -> float:
        """Epochs of all train steps together; 0: they count tokens."""
        return float(sum(step.epochs for step in self.train_steps))

    def train_amount(self) -> float:
        """Tokens, or epochs, of all train steps together."""
        return sum(step.amount for step in self.train_steps)

    def train_tokens(self) -> int:
        """Tokens of all train steps together; 0 where they count epochs."""
        return sum(step.tokens for step in self.train_steps)

    def counted(self) -> Recipe:
        """The recipe in tokens, an epoch being `epoch_tokens`.

        Raises:
            ValueError: a step has epochs, and nobody says how many tokens one is.
        """
        if not self.epochs:
            return self
        if not self.epoch_tokens:
            raise ValueError(
                f"recipe {self.name} trains {self.epochs:g} epochs of a text that is not counted "
                "here: write `epoch_tokens` in the recipe, or use --tokens"
            )
        steps = tuple(
            replace(step, tokens=round(step.epochs * self.epoch_tokens), epochs=0.0)
            if isinstance(step, Train)
            else step
            for step in self.steps
        )
        return replace(self, steps=steps)

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
