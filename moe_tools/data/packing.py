"""A source -> the rows of tokens that a run reads, in memory or on the disk.

Shapes: B blocks, T tokens a block (`length`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from moe_tools.cached import cache_file
from moe_tools.data.batching import Batches, Text
from moe_tools.data.holdout import TextSplit
from moe_tools.data.parallel import workers
from moe_tools.data.progress import progress
from moe_tools.data.reader import Reader
from moe_tools.data.rows import Bos, InMemory, Mixed, Packing, Row, Rows
from moe_tools.data.shards import Stored
from moe_tools.data.sources import mixture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IN_MEMORY = 2**24
"""Tokens up to which a text is tokenised by each run and kept in memory; a longer one is
tokenised once, in shards on the disk."""


def blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TextSplit,
    length: int,
    tokens: int | None,
    seed: int = 0,
) -> Tensor:
    """The tokens of a source, packed: passages, each followed by EOS, cut into equal blocks.

    Passages (documents, cut at about 8,192 characters) stand in the order of a hash of themselves
    and the seed, so every budget samples the whole corpus, a larger one only appends blocks, and a
    passage more or less moves no other (of a hub stream: inside its window of rows). The order of
    held-out passages knows no seed. Every block begins as the tokenizer begins a text (BOS, CLS, or
    nothing): models that were trained so need it (Gemma 3 270M on prose: perplexity 62 without, 25
    with it). No other special tokens are added.

    Args:
        source: as for `texts`, or several of them with their weights (`mixture`).
        tokenizer: its EOS, else SEP, else PAD token ends a passage.
        split: "train" or "heldout".
        length: tokens a block.
        tokens: how many are wanted, rounded up to whole blocks; None is all of them. If there are
            fewer, a warning is logged and all blocks are returned.
        seed: orders the training passages.

    Returns:
        blocks_BT, int64.

    Raises:
        ValueError: a size is not positive, the source cannot be read or its text does not fill one
            block, or the tokenizer has no token to end a passage.
    """
    found = rows(source, tokenizer, split=split, length=length, tokens=tokens, seed=seed)
    return found.tensor()


def rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TextSplit,
    length: int,
    tokens: int | None,
    seed: int = 0,
    packing: Packing = "joined",
    bos: Bos = "auto",
) -> Rows:
    """The rows that `blocks` are a tensor of, read when they are asked for.

    A text of more than `IN_MEMORY` tokens is tokenised once, into the user's cache
    (`moe_tools.data.shards`): one from files before this returns, a stream of the hub as it is
    read. Conversations are written by the tokenizer's chat template, and the loss is on what the
    assistant says.

    Args:
        source: see `blocks`.
        tokenizer: see `blocks`.
        split: see `blocks`.
        length: tokens of the longest row.
        tokens: see `blocks`.
        seed: see `blocks`.
        packing: how texts share a row.
        bos: whether rows of text begin with BOS.

    Raises:
        ValueError: as `blocks`; or a tokenizer that cannot write conversations.
    """
    check_size("length", length)
    wanted = None if tokens is None else blocks_for(tokens, length) * length
    parts = mixture(source)
    if len(parts) > 1:
        read = partial(
            rows,
            tokenizer=tokenizer,
            split=split,
            length=length,
            seed=seed,
            packing=packing,
            bos=bos,
        )
        return _mixed(parts, wanted, length, read)
    place = cache_file("text")
    reader = Reader(source, tokenizer, split, length, seed, packing, bos, place)
    if wanted is None or wanted <= IN_MEMORY:
        found = _in_memory(reader, wanted, tokens)
        if found is not None:
            return found
    _ = reader.form  # a source that is not there is said before anything is named after it
    stored = Stored(place / reader.key, replace(reader, workers=workers()), wanted)
    if not len(stored):
        raise ValueError(_too_short(f"{source!r} ({split})", 0, length))
    if wanted is not None and not stored.endless and stored.tokens < wanted:
        logger.warning(
            "%r (%s) has %s tokens, fewer than the %s asked for: using them all",
            *(source, split, stored.tokens, tokens),
        )
    return stored


def _mixed(
    parts: list[tuple[str, float]],
    wanted: int | None,
    length: int,
    read: partial[Rows],
) -> Rows:
    total = sum(weight for _, weight in parts)
    found = []
    for name, weight in parts:
        share = None
        if wanted is not None:
            share = (math.ceil(weight / total * (wanted // length)) + 1) * length
        found.append(read(name, tokens=share))
    mixed = Mixed(found, [weight for _, weight in parts], wanted)
    if mixed.used_up is not None:
        logger.warning("%r is used up after %d blocks", parts[mixed.used_up][0], len(mixed))
    return mixed


def _in_memory(reader: Reader, wanted: int | None, asked: int | None) -> InMemory | None:
    """All rows of a text, or the first of them; None: they are too many."""
    cutter, found, seen = reader.cutter(), list[Row](), 0
    have = 0
    with progress("tokenising", wanted, "token") as bar:
        for pieces, _ in reader.read():
            count = sum(len(piece.ids_T) for piece in pieces)
            seen += count
            for row in cutter.cut(pieces):
                found.append(row)
                have += len(row.ids_T)
            bar.update(count)
            if wanted is not None and have >= wanted:
                break
            if have > IN_MEMORY:
                return None
    where = f"{reader.source!r} ({reader.split})"
    cutter.tell(where)
    if not found:
        if cutter.unlearned:
            raise ValueError(
                f"{where} has no token that an assistant says, and the loss is on those: give "
                "conversations with turns of the role 'assistant'"
            )
        raise ValueError(_too_short(where, seen, reader.length))
    if wanted is not None and have < wanted:
        logger.warning(
            "%s has %s tokens, fewer than the %s asked for: using %s blocks of %s = %s tokens",
            *(where, seen, asked, len(found), reader.length, have),
        )
    if wanted is not None:
        found = found[: _until(found, wanted)]
    return InMemory(reader.length, cutter.uniform, found)


def _until(rows: list[Row], wanted: int) -> int:
    """How many of the first rows hold so many tokens."""
    ends = itertools.accumulate(len(row.ids_T) for row in rows)
    return next((n for n, end in enumerate(ends, start=1) if end >= wanted), len(rows))


def fingerprint(text: Text) -> str:
    """16 hex digits of the SHA-256 of shapes, tokens and labels: equal means the same text."""
    if isinstance(text, Batches):
        return text.fingerprint
    found = hashlib.sha256()
    for tensor in _tensors(text):
        numbers = tensor.detach().cpu()
        numbers = numbers if numbers.is_floating_point() else numbers.long()
        kind = "<f8" if numbers.is_floating_point() else "<i8"
        found.update(str(tuple(numbers.shape)).encode())
        found.update(numbers.contiguous().numpy().astype(kind).tobytes())
    return found.hexdigest()[:16]


def _tensors(text: Text) -> Iterator[Tensor]:
    if isinstance(text, Tensor):
        yield text
    else:
        yield from (tensor for batch in text for tensor in batch if isinstance(tensor, Tensor))


def blocks_for(tokens: int, length: int) -> int:
    """Blocks of `length` that hold at least this many tokens.

    Raises:
        ValueError: one of the two is not positive.
    """
    check_size("tokens", tokens)
    check_size("length", length)
    return -(-tokens // length)


def check_size(name: str, value: int) -> None:
    """Refuse a size below 1 with a ValueError."""
    if value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1: use a positive number")


def _too_short(where: str, have: int, length: int) -> str:
    if have == 0:
        return f"{where} has no text: use another source"
    fits = 1 << (have.bit_length() - 1)
    return (
        f"{where} has {have} tokens, one block needs {length}: "
        f"use --block-length {fits} or more text"
    )
