"""Documents -> blocks of tokens.

Shapes: B blocks, T tokens a block (`length`).
"""

import hashlib
import itertools
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_tools.data.batch import Text
from moe_tools.data.holdout import TextSplit, boundary, digest
from moe_tools.data.progress import progress
from moe_tools.data.sources import is_hub, mixture, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PASSAGE = 8192
"""Characters; longer documents are cut, or one long book could not be mixed with others."""

BATCH = 32
"""Passages a call of the tokenizer: enough for its threads, little to throw away."""

HUB_WINDOW = 1000
"""Rows of a hub data set that are put in order together: a stream is never there as a whole."""


def blocks(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
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
    check_size("length", length)
    wanted = None if tokens is None else blocks_for(tokens, length)
    parts = mixture(source)
    if len(parts) > 1:
        pack = partial(blocks, tokenizer=tokenizer, split=split, length=length, seed=seed)
        return _mixed(parts, wanted, lambda name, n: pack(name, tokens=n and n * length))
    end, begin = _end_token(tokenizer), begin_tokens(tokenizer)
    fresh = length - len(begin)
    if fresh < 1:
        raise ValueError(
            f"blocks of {length} tokens have no room for text: this tokenizer begins a text with "
            f"{len(begin)} tokens, use a larger --block-length"
        )
    passages = _ordered(source, split, seed)
    ids = _tokenise(passages, tokenizer, end, None if wanted is None else wanted * fresh)
    where = f"{source!r} ({split})"
    if len(ids) < fresh:
        raise ValueError(_too_short(where, len(ids), length))
    have = len(ids) // fresh
    if wanted is not None and have < wanted:
        logger.warning(
            "%s has %s tokens, fewer than the %s asked for: using %s blocks of %s = %s tokens",
            *(where, len(ids), tokens, have, length, have * length),
        )
    count = have if wanted is None else min(have, wanted)
    text_BT = torch.tensor(ids[: count * fresh], dtype=torch.int64).view(count, fresh)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), text_BT], dim=1)


def _mixed(
    parts: list[tuple[str, float]],
    wanted: int | None,
    pack: Callable[[str, int | None], Tensor],
) -> Tensor:
    """Blocks of several sources in turn: after every block, each has its share, to one block.

    The text ends with the first source that is used up, so that the shares hold throughout.
    """
    total = sum(weight for _, weight in parts)
    shares = [weight / total for _, weight in parts]
    packed = [
        pack(name, None if wanted is None else math.ceil(share * wanted) + 1)
        for (name, _), share in zip(parts, shares, strict=True)
    ]
    chosen: list[Tensor] = []
    taken = [0] * len(parts)
    while wanted is None or len(chosen) < wanted:
        owed = [share * (len(chosen) + 1) - n for share, n in zip(shares, taken, strict=True)]
        source = owed.index(max(owed))
        if taken[source] == len(packed[source]):
            logger.warning("%r is used up after %d blocks", parts[source][0], len(chosen))
            break
        chosen.append(packed[source][taken[source]])
        taken[source] += 1
    return torch.stack(chosen)


def fingerprint(text: Text) -> str:
    """16 hex digits of the SHA-256 of shapes, tokens and labels: equal means the same text."""
    found = hashlib.sha256()
    for tensor in _tensors(text):
        rows = tensor.detach().cpu().to(torch.int64).contiguous()
        found.update(str(tuple(rows.shape)).encode() + rows.numpy().astype("<i8").tobytes())
    return found.hexdigest()[:16]


def _tensors(text: Text) -> Iterator[Tensor]:
    if isinstance(text, Tensor):
        yield text
    else:
        yield from (tensor for batch in text for tensor in batch if tensor is not None)


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


def begin_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer itself puts before a text; nothing for many."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


def _end_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What stands between passages. Encoders have no EOS: SEP is what they know as an end."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        if isinstance(token, int):
            return token
    raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r} has no EOS, SEP or PAD token, and one must stand "
        "between documents: set tokenizer.eos_token"
    )


def _ordered(source: str, split: TextSplit, seed: int) -> Iterator[str]:
    """The passages of a source in the order of packing, which never depends on the budget."""
    documents = texts(source, split=split)
    for window in _batches(documents, HUB_WINDOW if is_hub(source) else None):
        passages = (passage for text in window for passage in _passages(text))
        yield from sorted(passages, key=digest) if split == "heldout" else _mix(passages, seed)


def _mix(passages: Iterable[str], seed: int) -> list[str]:
    """Passages by a hash of seed and text; copies of one lie apart, as training wants them.

    Not by a permutation: with one passage more that is another draw, and nearly all others move.
    """
    copies = Counter[str]()
    placed = []
    for passage in passages:
        placed.append((digest(f"{seed} {copies[passage]} {passage}"), passage))
        copies[passage] += 1
    return [passage for _, passage in sorted(placed)]


def _batches(items: Iterable[str], size: int | None) -> Iterator[list[str]]:
    """Lists of up to `size` items; None is one list of all."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _passages(text: str) -> Iterator[str]:
    """Cut a long document, between paragraphs if it has some."""
    start = 0
    while start < len(text):
        end = start + PASSAGE
        if end < len(text):
            end = boundary(text, start + PASSAGE // 2, end)
        passage = text[start:end].strip()
        if passage:
            yield passage
        start = end


def _tokenise(
    passages: Iterable[str], tokenizer: "PreTrainedTokenizerBase", end: int, enough: int | None
) -> "array[int]":
    """The ids of all passages, each followed by `end`; stops after `enough` of them."""
    ids = array("q")
    with progress("tokenising", enough, "token") as bar:
        for batch in _batches(passages, BATCH):
            before = len(ids)
            # verbose=False: that a passage exceeds the model's context is nothing to warn about.
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)
            for row in encoded["input_ids"]:
                ids.extend(row)
                ids.append(end)
            bar.update(len(ids) - before)
            if enough is not None and len(ids) >= enough:
                break
    return ids


def _too_short(where: str, have: int, length: int) -> str:
    if have == 0:
        return f"{where} has no text: use another source"
    fits = 1 << (have.bit_length() - 1)
    return (
        f"{where} has {have} tokens, one block needs {length}: "
        f"use --block-length {fits} or more text"
    )
