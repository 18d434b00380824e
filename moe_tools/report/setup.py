"""What all rows of a table share: the held-out text, how it is cut, the dtype and the device.

Letters: B blocks, T tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_tools.data import Batch, Blocks, Task, Text, blocks, calibration_text, task_batches
from moe_tools.data.holdout import TextSplit
from moe_tools.measure.tasks import Tasks

CALIBRATION = 8192
"""Training tokens that set the thresholds of the baselines."""


@dataclass(frozen=True)
class Setup:
    """What every row has in common."""

    data: str = "docs"
    """Source of the text, which is its held-out part."""
    tokens: int = 32768
    block_length: int = 512
    """Tokens of a block."""
    batch_size: int = 4
    """Blocks of one forward pass."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    """Decides which tokens of an encoder's blocks are masked, and what tasks draw."""
    after: int = 0
    """Only what follows the first `after` tokens of every block is predicted."""
    task: Task | None = None
    """What the models were made for; None: what the head of the first one says."""
    tasks: Tasks = field(default_factory=Tasks)
    """Tasks of lm-evaluation-harness, beside the perplexity."""

    def text(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> Text:
        """Reads the held-out text: blocks_BT for language models, else the batches of a task."""
        if task != "lm":
            return self._batches(task, tokenizer, "heldout", self.tokens)
        return self._blocks(tokenizer, "heldout", self.tokens)

    def calibration_BT(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> Blocks:
        """Reads the training text that sets the thresholds of the baselines."""
        if task != "lm":
            batches = self._batches(task, tokenizer, "train", CALIBRATION)
            return calibration_text(batches, self.block_length)
        return self._blocks(tokenizer, "train", CALIBRATION)

    def _batches(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, split: TextSplit, tokens: int
    ) -> list[Batch]:
        return task_batches(
            task,
            self.data,
            tokenizer,
            split=split,
            length=self.block_length,
            batch_size=self.batch_size,
            tokens=tokens,
        )

    def _blocks(self, tokenizer: PreTrainedTokenizerBase, split: TextSplit, tokens: int) -> Tensor:
        return blocks(self.data, tokenizer, split=split, length=self.block_length, tokens=tokens)


def held_out(data: str) -> str:
    """Names the source of a recipe's held-out text: docs for `self`, which has no such part."""
    return "docs" if data == "self" else data
