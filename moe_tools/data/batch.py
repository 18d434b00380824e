"""Defines what one forward pass takes.

Letters: B rows, T tokens of a row, S tokens that a decoder says about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_tools.names import IGNORE


class Batch(NamedTuple):
    """Rows of tokens that have one length."""

    ids_BT: Tensor
    labels_B: Tensor | None = None
    """The class of each row, a whole number, or its score, a float; None: tokens are predicted."""
    learned_BT: Tensor | None = None
    """Tokens that a language model learns to say; None: all of them."""
    mask_BT: Tensor | None = None
    """Tokens that are no padding; None: all."""
    positions_BT: Tensor | None = None
    """Where each token stands in its own text; None: a row is one text, from 0 on."""
    types_BT: Tensor | None = None
    """Which of two texts each token is of; None: there is one, or the tokenizer makes no such."""
    targets_BS: Tensor | None = None
    """What a decoder has to say about each row, `IGNORE` behind its end; None: there is none."""

    def next_labels_BT(self) -> Tensor:
        """What a language model has to say at each token: the one behind it; `IGNORE`: nothing.

        Of an encoder-decoder, what its decoder has to say.
        """
        if self.targets_BS is not None:
            return self.targets_BS
        labels_BT = self.ids_BT
        if self.learned_BT is not None:
            labels_BT = labels_BT.masked_fill(~self.learned_BT, IGNORE)
        return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)

    @property
    def tokens(self) -> int:
        """How many tokens it has, padding left out; what a decoder says counts, too."""
        said = 0 if self.targets_BS is None else int((self.targets_BS != IGNORE).sum())
        return said + (self.ids_BT.numel() if self.mask_BT is None else int(self.mask_BT.sum()))

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return self.each(lambda one: one.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed alike."""
        return Batch._make(None if one is None else change(one) for one in self)

    def rows(self, which: list[int]) -> Batch:
        """Some of its rows, in this order."""
        return self.each(lambda one: one[which])
