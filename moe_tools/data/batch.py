"""Defines what one forward pass takes. Letters: B rows, T tokens of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_tools.names import IGNORE


class Batch(NamedTuple):
    """Rows of tokens that have one length."""

    ids_BT: Tensor
    labels_B: Tensor | None = None
    """The class of each row; None: a language model predicts the next token."""
    learned_BT: Tensor | None = None
    """Tokens that a language model learns to say; None: all of them."""
    mask_BT: Tensor | None = None
    """Tokens that are no padding; None: all."""
    positions_BT: Tensor | None = None
    """Where each token stands in its own text; None: a row is one text, from 0 on."""

    def next_labels_BT(self) -> Tensor:
        """What a language model has to say at each token: the one behind it; `IGNORE`: nothing."""
        labels_BT = self.ids_BT
        if self.learned_BT is not None:
            labels_BT = labels_BT.masked_fill(~self.learned_BT, IGNORE)
        return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        fields = {name: one for name, one in self._asdict().items() if one is not None}
        return Batch(**{name: one.to(device) for name, one in fields.items()})

    @property
    def tokens(self) -> int:
        """How many tokens it has, padding left out."""
        return self.ids_BT.numel() if self.mask_BT is None else int(self.mask_BT.sum())
