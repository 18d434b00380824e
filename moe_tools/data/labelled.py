"""Labelled documents -> batches of token rows of one length, so that no row needs padding.

A padding token would be routed, counted and paid for like any other; rows of the same length make
it unnecessary.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_tools.data.batch import Batch
from moe_tools.data.examples import Example, read_labelled, read_scored
from moe_tools.data.holdout import TextSplit, check_split, digest, normalise
from moe_tools.data.packing import check_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 5
"""One document in this many is held out: an accuracy needs more of them than a perplexity."""


def label_names(source: str) -> list[str]:
    """The labels of a file, sorted: label i is the i-th."""
    return _names(read_labelled(source))


def _names(examples: Iterable[Example]) -> list[str]:
    return sorted({str(example.label) for example in examples})


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
    another order each time; held-out rows come once. Copies of a text are on one side. Of a pair
    the first text decides the side; the longer one is cut first.

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
    everything = read_labelled(source)
    numbers = {name: index for index, name in enumerate(_names(everything))}
    wanted = Wanted(source, split, length, batch_size, tokens, seed)
    return _batches(everything, lambda label: numbers[str(label)], tokenizer, wanted)


def scored_batches(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TextSplit,
    length: int,
    batch_size: int,
    tokens: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """The same with scores in place of classes: `labels_B` are floats, fp32.

    Raises:
        ValueError: as `read_scored`, a size below 1, or no example in the split.
    """
    wanted = Wanted(source, split, length, batch_size, tokens, seed)
    return _batches(read_scored(source), float, tokenizer, wanted)


@dataclass(frozen=True)
class Wanted:
    """Which rows of a file are wanted, in which batches: the arguments of `labelled_batches`."""

    source: str
    split: TextSplit
    length: int
    batch_size: int
    tokens: int | None
    seed: int

    def __post_init__(self) -> None:
        check_split(self.split)
        check_size("length", self.length)
        check_size("batch_size", self.batch_size)

    def side(self, text: str) -> bool:
        """Whether a text, and each copy of it, is of this split."""
        return _held_out(text) == (self.split == "heldout")

    def none_left(self, of: str = "") -> ValueError:
        """The error where no example is."""
        return ValueError(f"{self.source!r} has no {self.split} example{of}: give more")

    def fill(self, epoch: Callable[[int, bool], Iterable[Batch]]) -> list[Batch]:
        """Batches of epoch after epoch, until there are tokens enough.

        `epoch` gets its seed, and whether it is shuffled.
        """
        train = self.split == "train"
        batches: list[Batch] = []
        found = 0
        for number in _epochs(once=not train or self.tokens is None):
            for batch in epoch(self.seed + number, train):
                if self.tokens is not None and found >= self.tokens:
                    return batches
                batches.append(batch)
                found += batch.tokens
        return batches


class Labelled(NamedTuple):
    """One tokenised example."""

    ids: list[int]
    types: list[int] | None
    label: int | float


def _batches(
    everything: list[Example],
    number: Callable[[str | float], int | float],
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
) -> list[Batch]:
    examples = [example for example in everything if wanted.side(example.text)]
    if not examples:
        raise wanted.none_left()
    encoded = _encode(examples, tokenizer, wanted.length)
    found = zip(*encoded, examples, strict=True)
    rows = [Labelled(ids, types, number(one.label)) for ids, types, one in found if ids]
    if not rows:  # there would be no end of epochs without a token
        raise wanted.none_left(" of which a token is left")
    return wanted.fill(lambda seed, shuffle: _epoch(rows, wanted.batch_size, seed, shuffle))


def _encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[list[int]], Sequence[list[int] | None]]:
    """Tokens of each example, and which of its two texts they are of, if the tokenizer says it."""
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples if example.pair is not None]
    if not pairs:
        found = tokenizer(texts, truncation=True, max_length=length, verbose=False)
        return found["input_ids"], [None] * len(texts)
    found = tokenizer(texts, pairs, truncation="longest_first", max_length=length, verbose=False)
    return found["input_ids"], found.get("token_type_ids", [None] * len(texts))


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


def _epoch(rows: list[Labelled], batch_size: int, seed: int, shuffle: bool) -> Iterator[Batch]:
    """Batches that have every row once, each of rows of one length."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist() if shuffle else range(len(rows))
    by_length: dict[int, list[int]] = defaultdict(list)
    for index in order:
        by_length[len(rows[index].ids)].append(index)
    groups = [
        same[start : start + batch_size]
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), batch_size)
    ]
    if shuffle:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        chosen = [rows[index] for index in group]
        types = [row.types for row in chosen if row.types is not None]
        labels = [row.label for row in chosen]
        yield Batch(
            torch.tensor([row.ids for row in chosen]),
            torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else None),
            types_BT=torch.tensor(types) if types else None,
        )
