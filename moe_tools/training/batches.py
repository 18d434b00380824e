"""The text of a train step in the batches that its passes see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from moe_tools import processes
from moe_tools.data import Batch, Batches, Text
from moe_tools.data.rows import of_blocks

if TYPE_CHECKING:
    from moe_tools.training.train import Train


def in_batches(text: Text, size: int) -> Sequence[Batch]:
    """What each forward pass sees; the last of blocks may be smaller."""
    return Batches(of_blocks(text), "joined", size) if isinstance(text, Tensor) else text


def whole_batches(text: Text, step: Train) -> Sequence[Batch]:
    """The batches of whole optimizer steps of all processes; a resumed run would go on into a rest.

    Less text than one step has is one step, of one process.

    Raises:
        ValueError: less text than one step of several processes has.
    """
    text = in_batches(text, step.batch_size)
    whole = len(text)
    if isinstance(text, Batches) and text.packing != "isolated":
        whole = len(text.rows) // step.batch_size  # the last batch may be short
    needed = step.accumulate * processes.count()
    if whole < needed and processes.count() > 1:
        raise ValueError(
            f"the text has {whole} batches, but one optimizer step takes {needed}, "
            f"{step.accumulate} of each process: give more text or start fewer processes"
        )
    return text[: whole // needed * needed] if whole >= needed else text
