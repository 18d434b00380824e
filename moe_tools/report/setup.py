"""What all rows of a table share: the held-out text, how it is cut, the dtype and the device.

Letters: B blocks, T tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from moe_tools.data import Batch, Batches, Blocks, Task, Text, calibration_text, rows, task_batches
from moe_tools.data.holdout import TextSplit
from moe_tools.data.protocols import check_stride, named_protocol, protocol_windows
from moe_tools.data.rows import Bos, Rows
from moe_tools.data.sources import form, mixture
from moe_tools.measure.tasks import Tasks

CALIBRATION = 8192
"""Training tokens that set the thresholds of the baselines."""


@dataclass(frozen=True)
class Setup:
    """What every row has in common."""

    data: str = "docs"
    """Source of the text, which is its held-out part; with a protocol, of what baselines are
    calibrated on alone."""
    tokens: int | None = 32768
    """None: all."""
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
    probes: int = 0
    """Questions of each of `moe_tools.measure.probes`, beside the perplexity; 0: none."""
    bos: Bos = "auto"
    """Whether rows of text begin with BOS."""
    protocol: str | None = None
    """One of `PROTOCOLS`, whose text stands in for the held-out one; its windows are blocks."""
    copy: str | None = None
    """Source that stands in for the protocol's data set."""
    stride: int | None = None
    """Tokens from the start of a window of the protocol to that of the next."""

    @property
    def measured(self) -> str:
        """Names the source of what is measured on."""
        if self.protocol is None:
            return self.data
        return self.copy or named_protocol(self.protocol).source

    @property
    def called(self) -> str:
        """Names the protocol, and that it is cut short; nothing without one."""
        if self.protocol is None or self.tokens is None:
            return self.protocol or ""
        return f"the first {self.tokens} tokens of {self.protocol}"

    def check(self) -> None:
        """Checks what needs neither text nor model.

        Raises:
            ValueError: tasks that are not there, an unknown protocol, what only a protocol has
                without one, or a stride that leaves tokens out.
        """
        self.tasks.check()
        if self.protocol is not None:
            named_protocol(self.protocol)
            check_stride(self.block_length, self.stride, self.after)
        elif self.stride is not None or self.copy is not None:
            raise ValueError("windows with a stride are of a protocol: name one by --protocol")

    def text(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> Text:
        """Reads what is measured on: blocks_BT, or batches of a task or of conversations."""
        if self.protocol is not None:
            return protocol_windows(
                self.protocol,
                tokenizer,
                length=self.block_length,
                stride=self.stride,
                source=self.copy,
                tokens=self.tokens,
            )
        if task != "lm":
            return self._batches(task, tokenizer, "heldout", self.tokens)
        found = self._rows(tokenizer, "heldout", self.tokens)
        if found.uniform:
            return found.tensor()
        return Batches(found, "padded", self.batch_size)

    def calibration_BT(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> Blocks:
        """Reads the training text that sets the thresholds of the baselines."""
        if task != "lm":
            batches = self._batches(task, tokenizer, "train", CALIBRATION)
            return calibration_text(batches, self.block_length)
        return self._rows(tokenizer, "train", CALIBRATION).tensor()

    def _batches(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, split: TextSplit, tokens: int | None
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

    def _rows(
        self, tokenizer: PreTrainedTokenizerBase, split: TextSplit, tokens: int | None
    ) -> Rows:
        """Running text end to end; conversations one by one, however they were trained on."""
        forms = {form(name) for name, _ in mixture(self.data)}
        return rows(
            self.data,
            tokenizer,
            split=split,
            length=self.block_length,
            tokens=tokens,
            packing="joined" if forms == {"text"} else "padded",
            bos=self.bos,
        )


def held_out(data: str) -> str:
    """Names the source of a recipe's held-out text: docs for `self`, which has no such part."""
    return "docs" if data == "self" else data
