"""Defines what one forward pass takes. Letters: B rows, T tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Rows of tokens that have one length."""

    ids_BT: Tensor
    labels_B: Tensor | None = None
    """The class of each row; None: a language model predicts the next token."""


Text = Tensor | Sequence[Batch]
"""blocks_BT of running text, or labelled batches."""


def token_count(text: Text) -> int:
    """Number of tokens of a text."""
    if isinstance(text, Tensor):
        return text.numel()
    return sum(batch.ids_BT.numel() for batch in text)
