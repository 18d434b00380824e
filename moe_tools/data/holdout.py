"""Which part of a corpus training never sees: decided by the text or its path, never by chance."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

TextSplit = Literal["train", "heldout"]

ONE_IN = 20
"""One document (or file, or row) in this many is held out: 5 %."""

_SEPARATORS = ("\n\n", "\n", " ")
"""Where a text may be cut, best first: between paragraphs, lines, words."""

_SLACK = 80
"""Characters to look for a separator, at least: short texts are not to be cut inside a word."""


def check_split(split: str) -> None:
    """Refuse any split but "train" and "heldout" with a ValueError."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is unknown: use 'train' or 'heldout'")


def normalise(text: str) -> str:
    """The text without case and layout: what two copies of one passage have in common."""
    return " ".join(text.lower().split())


def digest(text: str) -> int:
    """A 64-bit number that is the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big")


def is_held_out(key: str) -> bool:
    """Whether the document (or file) with this text (or path) is among the 5 % held out."""
    return digest(key) % ONE_IN == 0


def divide(
    documents: Callable[[], Iterable[str]],
    split: TextSplit,
    source: str,
    words: Callable[[str], str] | None = None,
) -> Iterator[str]:
    """The documents of one split, in their old order; the source is read twice, and not kept.

    From 20 distinct documents on, the 5 % with the smallest hashes of their normalised text are
    held out: copies of a document stay on one side. With fewer, the last 5 to 10 % of the text is
    (more of a very short one); or, with its copies, the last document where these stay whole.

    Args:
        documents: gives them.
        split: the one that is wanted.
        source: as an error calls it.
        words: what a document says, where it is no running text and stays whole.

    Raises:
        ValueError: the text is too short to have two sides.
    """
    said = documents() if words is None else map(words, documents())
    hashes = np.array(array("Q", (digest(normalise(text)) for text in said)))
    distinct = np.unique(hashes)
    if len(distinct) < ONE_IN:
        if words is None:
            head, tail = _cut_tail([*documents()], source)
            return iter(head if split == "train" else tail)
        if len(distinct) < 2:
            raise ValueError(f"{source!r} has one document, and none to hold out: give more")
        kept = (hashes == hashes[-1]) == (split == "heldout")
        return (text for text, keep in zip(documents(), kept, strict=True) if keep)
    # By rank and not by `is_held_out`: of 20 documents, chance would often hold out none.
    limit = distinct[len(distinct) // ONE_IN - 1]
    kept = (hashes <= limit) == (split == "heldout")
    return (text for text, keep in zip(documents(), kept, strict=True) if keep)


def boundary(text: str, low: int, high: int) -> int:
    """The best place to cut between the characters `low` and `high`, or `high` if none is good."""
    for separator in _SEPARATORS:
        found = text.rfind(separator, low, high)
        if found > low:
            return found
    return high


def _cut_tail(documents: list[str], source: str) -> tuple[list[str], list[str]]:
    """Everything but the last characters, and those."""
    head, tail = list(documents), list[str]()
    share = missing = max(1, sum(map(len, documents)) // ONE_IN)
    while len(head) > 1 and missing > share // 2 and len(head[-1]) <= 2 * missing:
        missing -= len(head[-1])
        tail.insert(0, head.pop())
    if missing > share // 2:  # what precedes is long, or the only document
        last = head.pop()
        high = len(last) - missing
        at = boundary(last, max(len(last) // 2, high - max(missing, _SLACK)), high)
        head.append(last[:at].strip())
        tail.insert(0, last[at:].strip())
    if not any(head) or not any(tail):
        raise ValueError(
            f"{source!r} has {sum(map(len, documents))} characters, too few to hold some out: "
            "use more text"
        )
    return head, tail
