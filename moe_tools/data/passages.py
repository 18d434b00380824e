"""Documents -> passages in the order of packing.

The order needs all passages at once, and they may not fit in memory: they lie in a file without a
name, and in memory are 24 bytes of each.

Letters: N passages.
"""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_tools.data.holdout import TextSplit, boundary, digest

PASSAGE = 8192
"""Characters; longer documents are cut, or one long book could not be mixed with others."""
IN_MEMORY = 2**26
"""Bytes of passages up to which no file is written."""


class Passages:
    """Passages that are put in order once all are there."""

    def __init__(self, place: Path | None = None) -> None:
        """`place` is the folder of the file that takes what memory should not."""
        folder = None if place is None else _made(place)
        self.file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=folder)  # noqa: SIM115
        self.ends = array("Q", [0])
        self.keys = array("Q")

    def add(self, passage: str) -> None:
        """Takes one passage."""
        self.keys.append(digest(passage))
        self.ends.append(self.ends[-1] + self.file.write(passage.encode()))

    def ordered(self, split: TextSplit, seed: int, start: int = 0) -> Iterator[str]:
        """The passages by a hash of themselves, of training text and the seed; then it is empty.

        Not by a permutation: with one passage more that is another draw, and nearly all others
        move. Copies of a training passage lie apart, as training wants them.

        Args:
            split: the order of held-out text knows no seed.
            seed: of the order.
            start: passages at the front that are left out.
        """
        keys_N = np.array(self.keys)
        if split == "train":
            for n, copy in enumerate(_copies_N(keys_N)):
                keys_N[n] = digest(f"{seed} {copy} {self._read(n)}")
        with self.file:
            for n in np.argsort(keys_N, kind="stable")[start:]:
                yield self._read(int(n))

    def _read(self, n: int) -> str:
        begin, end = self.ends[n], self.ends[n + 1]
        self.file.seek(begin)
        return self.file.read(end - begin).decode()


def _made(place: Path) -> str | None:
    """A folder that is there; None, the system's own, where none can be made."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(place)


def _copies_N(keys_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many equal passages stand before each."""
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    new_N = np.r_[True, sorted_N[1:] != sorted_N[:-1]] if len(keys_N) else np.zeros(0, bool)
    places_N = np.arange(len(keys_N))
    copies_N = np.empty_like(places_N)
    copies_N[order_N] = places_N - np.maximum.accumulate(np.where(new_N, places_N, 0))
    return copies_N


def in_order(
    documents: Iterable[str],
    split: TextSplit,
    seed: int,
    *,
    start: int = 0,
    whole: bool = False,
    place: Path | None = None,
) -> Iterator[str]:
    """The passages of all documents in the order of packing, from number `start` on.

    Args:
        documents: read once.
        split: see `Passages.ordered`.
        seed: see `Passages.ordered`.
        start: see `Passages.ordered`.
        whole: a document is a passage, however long.
        place: see `Passages`.
    """
    found = Passages(place)
    for text in documents:
        for passage in [text] if whole else passages(text):
            found.add(passage)
    return found.ordered(split, seed, start)


def passages(text: str) -> Iterator[str]:
    """Cuts a long document, between paragraphs if it has some."""
    start = 0
    while start < len(text):
        end = start + PASSAGE
        if end < len(text):
            end = boundary(text, start + PASSAGE // 2, end)
        passage = text[start:end].strip()
        if passage:
            yield passage
        start = end


def batches(items: Iterable[str], size: int | None) -> Iterator[list[str]]:
    """Lists of up to `size` items; None is one list of all."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
