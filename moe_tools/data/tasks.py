"""What a model learns, and the batches of it. Letters: B rows, T tokens of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from moe_tools.data.batch import Batch
from moe_tools.data.batching import token_count
from moe_tools.data.holdout import TextSplit
from moe_tools.data.labelled import labelled_batches, labelled_blocks, scored_batches
from moe_tools.data.seq2seq import seq2seq_batches, unpadded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["lm", "classify", "regress", "seq2seq"]
"""lm: the next token. classify, regress: the class, or the score, of a text or a pair of texts.
seq2seq: what a decoder says about what an encoder reads."""
HEADS: tuple[Task, ...] = ("classify", "regress")
"""Tasks of a head on a model's body, which is new where the donor has none."""
READERS: Mapping[Task, Callable[..., list[Batch]]] = {
    "classify": labelled_batches,
    "regress": scored_batches,
    "seq2seq": seq2seq_batches,
}


def task_batches(
    task: Task,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TextSplit,
    length: int,
    batch_size: int,
    tokens: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """The batches of any task but `lm`, whose text is blocks.

    Args:
        task: what is learned.
        source: a .jsonl or .parquet file, with or without the names of its columns.
        tokenizer: see `labelled_batches`, as all that follow.
        split: "train" or "heldout".
        length: tokens that a row keeps at most.
        batch_size: rows of a batch at most.
        tokens: how many are wanted; None: every row once.
        seed: of the order.

    Raises:
        ValueError: as the reader of the task.
    """
    options = {"split": split, "length": length, "batch_size": batch_size}
    return READERS[task](source, tokenizer, **options, tokens=tokens, seed=seed)


class TaskText:
    """Rows that calibrate as blocks do, where more than tokens in one row goes into a model.

    They are never padded, so that nothing that looks at them has to leave padding out.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """How many rows."""
        return sum(len(batch.ids_BT) for batch in self.batches)

    def numel(self) -> int:
        """How many tokens."""
        return token_count(self.batches)

    def split(self, rows: int) -> Iterator[Batch]:
        """All rows, at most so many of the same lengths together."""
        for batch in self.batches:
            parts = (
                len(batch.ids_BT) * [None] if one is None else one.split(rows) for one in batch
            )
            yield from (Batch._make(part) for part in zip(*parts, strict=False))

    def __getitem__(self, first: slice) -> Batch:
        """The first rows, as many of those that were asked for as have one length."""
        return self.batches[0].each(lambda one: one[first])


Blocks = Tensor | TaskText
"""What calibrates: blocks_BT, or rows of a task."""


def calibration_text(batches: Sequence[Batch], length: int, tokens: int | None = None) -> Blocks:
    """The first tokens of the training rows: blocks of `length`, if a row is one text.

    A pair of texts and a source with its target stay rows: end to end, they would not be what the
    model is used on.
    """
    if all(batch.types_BT is None and batch.targets_BS is None for batch in batches):
        blocks_BT = labelled_blocks(batches, length)
        return blocks_BT if tokens is None else blocks_BT[: max(1, tokens // length)]
    rows, found = list[Batch](), 0
    for batch in unpadded(batches):
        if tokens is not None and found >= tokens and rows:
            break
        rows.append(batch)
        found += batch.tokens
    return TaskText(rows)
