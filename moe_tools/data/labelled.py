"""Labelled documents -> batches of token rows of one length, so that no row needs padding.

A padding token would be routed, counted and paid for like any other; rows of the same length make
it unnecessary.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_tools.data.batch import Batch
from moe_tools.data.examples import Example, read_labelled
from moe_tools.data.holdout import TextSplit, check_split, digest, normalise
from moe_tools.data.packing import check_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 5
"""One document in this many is held out: an accuracy needs more of them than a perplexity."""


def label_names(source: str) -> list[str]:
    """The labels of a file, sorted: label i is the i-th."""
    return _names(read_labelled(source))


def _names(examples: list[Example]) -> list[str]:
    return sorted({example.label for example in examples})


def labelled_batches(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TextSplit,
    length: int,
    batch_size: int,
    tokens: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """The examples of one split, tokenised with the tokenizer's special tokens.

    Training rows come in a seeded random order, again and again until `tokens` is reached, in
    another order each time; held-out rows come once. Copies of a text are on one side.

    Args:
        source: as for `read_labelled`.
        tokenizer: the model's.
        split: "train" or "heldout": one in `HELD_OUT` distinct texts, by hash.
        length: tokens that a row keeps at most.
        batch_size: rows of a batch at most.
        tokens: how many are wanted, rounded up to a batch; None: every example once.
        seed: of the order.

    Raises:
        ValueError: as `read_labelled`, a size below 1, or no example in the split.
    """
    check_split(split)
    check_size("length", length)
    check_size("batch_size", batch_size)
    everything = read_labelled(source)
    names = _names(everything)
    examples = [e for e in everything if _held_out(e.text) == (split == "heldout")]
    if not examples:
        raise ValueError(f"{source!r} has no {split} example: give more")
    encoded = tokenizer(
        [example.text for example in examples], truncation=True, max_length=length, verbose=False
    )["input_ids"]
    pairs = zip(encoded, examples, strict=True)
    rows = [(ids, names.index(example.label)) for ids, example in pairs if ids]
    if not rows:  # there would be no end of epochs without a token
        raise ValueError(f"{source!r} has no {split} example of which a token is left: give more")
    batches: list[Batch] = []
    found = 0
    for epoch in _epochs(once=split == "heldout" or tokens is None):
        for batch in _epoch(rows, batch_size, seed + epoch, shuffle=split == "train"):
            if tokens is not None and found >= tokens:
                return batches
            batches.append(batch)
            found += batch.ids_BT.numel()
    return batches


def labelled_blocks(batches: Sequence[Batch], length: int) -> Tensor:
    """blocks_BT of the batches' tokens end to end; fewer than one block are one short block."""
    ids_T = torch.cat([batch.ids_BT.flatten() for batch in batches])
    whole = len(ids_T) // length * length
    return ids_T[:whole].view(-1, length) if whole else ids_T[None]


def _held_out(text: str) -> bool:
    return digest(normalise(text)) % HELD_OUT == 0


def _epochs(once: bool) -> Iterator[int]:
    epoch = 0
    while epoch == 0 or not once:
        yield epoch
        epoch += 1


def _epoch(
    rows: list[tuple[list[int], int]], batch_size: int, seed: int, shuffle: bool
) -> Iterator[Batch]:
    """Batches that have every row once, each of rows of one length."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist() if shuffle else range(len(rows))
    by_length: dict[int, list[int]] = defaultdict(list)
    for index in order:
        by_length[len(rows[index][0])].append(index)
    groups = [
        same[start : start + batch_size]
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), batch_size)
    ]
    if shuffle:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        ids_BT = torch.tensor([rows[index][0] for index in group])
        yield Batch(ids_BT, torch.tensor([rows[index][1] for index in group]))
