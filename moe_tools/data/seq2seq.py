"""Sources and their targets -> padded batches for an encoder-decoder.

Two lengths must fit for rows to share a batch, so rows of one length would mostly be alone. Batches
are made of rows of nearly the same lengths, and the little padding is masked on both sides.

Letters: B rows of a batch, T tokens of a source, S tokens of a target.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_tools.data.batch import Batch
from moe_tools.data.examples import open_labelled
from moe_tools.data.holdout import TextSplit
from moe_tools.data.labelled import Wanted
from moe_tools.data.paired import both, side_columns
from moe_tools.names import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NEARBY = 50
"""Batches whose rows are sorted by length together: the order stays random beyond them."""


class Sides(NamedTuple):
    """What an encoder reads, and what its decoder is to say."""

    source: str
    target: str


class Row(NamedTuple):
    """The same in tokens."""

    ids: list[int]
    targets: list[int]


def read_sides(source: str) -> list[Sides]:
    """The sources and targets of a .jsonl or .parquet file; rows that have neither are skipped.

    Args:
        source: the file, or FILE:SOURCE:TARGET with the names of the columns. Without, they are the
            first of `moe_tools.data.paired.SIDES` that are there.

    Raises:
        ValueError: no such file, another kind, no such columns, or a row with one of the two.
    """
    table, columns = open_labelled(source, "a source and a target", "FILE:SOURCE:TARGET")
    names = side_columns(table, table.kinds(), columns)
    found = (both(row, names, where) for where, row in table.rows(*names))
    return [Sides(*texts) for texts in found if texts is not None]


def seq2seq_batches(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TextSplit,
    length: int,
    batch_size: int,
    tokens: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Batches of sources (`ids_BT`) and targets (`targets_BS`), which end with EOS.

    Training rows come in a seeded random order, again and again until `tokens` is reached; held-out
    rows come once. Copies of a source are on one side.

    Args:
        source: as for `read_sides`.
        tokenizer: the model's.
        split: "train" or "heldout", as in `labelled_batches`.
        length: tokens that a source keeps at most, and a target.
        batch_size: rows of a batch at most.
        tokens: how many are wanted, sources and targets together, rounded up to a batch; None:
            every row once.
        seed: of the order.

    Raises:
        ValueError: as `read_sides`, a size below 1, no row in the split, or a tokenizer without an
            EOS token.
    """
    wanted = Wanted(source, split, length, batch_size, tokens, seed)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, with which a target ends: "
            "set tokenizer.eos_token"
        )
    found = [sides for sides in read_sides(source) if wanted.side(sides.source)]
    if not found:
        raise wanted.none_left()
    rows = [row for row in _encode(found, tokenizer, length) if row.ids]
    if not rows:
        raise wanted.none_left(" of which a token is left")
    return wanted.fill(lambda at, shuffle: _epoch(rows, batch_size, at, shuffle))


def unpadded(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The same rows without padding; of a batch, those of the same lengths stand together."""
    for batch in batches:
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in range(len(batch.ids_BT)):
            groups[_size(batch.mask_BT, batch.ids_BT, index), _said(batch, index)].append(index)
        for (length, said), rows in groups.items():
            chosen = batch.rows(rows)
            targets_BS = chosen.targets_BS
            yield chosen._replace(
                ids_BT=chosen.ids_BT[:, :length],
                mask_BT=None,
                targets_BS=None if targets_BS is None else targets_BS[:, :said],
            )


def _size(mask_BT: Tensor | None, ids_BT: Tensor, index: int) -> int:
    return ids_BT.shape[1] if mask_BT is None else int(mask_BT[index].sum())


def _said(batch: Batch, index: int) -> int:
    return 0 if batch.targets_BS is None else int((batch.targets_BS[index] != IGNORE).sum())


def _encode(found: list[Sides], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Row]:
    options = {"truncation": True, "max_length": length, "verbose": False}
    ids = tokenizer([sides.source for sides in found], **options)["input_ids"]
    # tokenizers of several languages write targets otherwise
    targets = tokenizer(text_target=[sides.target for sides in found], **options)["input_ids"]
    full = sum(len(row) == length for row in (*ids, *targets))
    if full:
        logger.info("%d sources or targets fill %d tokens, and may be cut", full, length)
    eos = tokenizer.eos_token_id
    for own, said in zip(ids, targets, strict=True):
        yield Row(own, said if said[-1:] == [eos] else [*said[: length - 1], eos])


def _epoch(rows: list[Row], batch_size: int, seed: int, shuffle: bool) -> Iterator[Batch]:
    """Batches that have every row once, each of rows whose lengths are near to each other."""
    generator = torch.Generator().manual_seed(seed)
    order = list(range(len(rows)))
    if shuffle:
        order = torch.randperm(len(rows), generator=generator).tolist()
    window = NEARBY * batch_size if shuffle else len(rows)
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: tuple(map(len, rows[i])))
        groups += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    if shuffle:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        yield _padded([rows[index] for index in group])


def _padded(rows: list[Row]) -> Batch:
    longest, most = (max(map(len, side)) for side in zip(*rows, strict=True))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    targets_BS = torch.full((len(rows), most), IGNORE)
    for index, (ids, targets) in enumerate(rows):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = True
        targets_BS[index, : len(targets)] = torch.tensor(targets)
    return Batch(ids_BT, mask_BT=None if mask_BT.all() else mask_BT, targets_BS=targets_BS)
