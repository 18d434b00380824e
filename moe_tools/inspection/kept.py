"""Keeps what every FFN decided about each of the first tokens.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_tools.inspection.tally import captured_T
from moe_tools.inspection.watch import Seen, Tokens


class Decisions(NamedTuple):
    """The decisions of one FFN, token by token."""

    number_T: Tensor
    """Number of the token among all tokens."""
    scores_TE: Tensor
    mask_TE: Tensor
    margin_TE: Tensor
    captured_T: Tensor
    """NaN where not measured."""


class Kept:
    """Decisions about the tokens with numbers below `count`."""

    def __init__(self, names: list[str], count: int) -> None:
        self.count = count
        self._ids: list[Tensor] = []
        self._parts: dict[str, list[Decisions]] = {name: [] for name in names}

    def begin(self, tokens: Tokens) -> None:
        """Notes that a forward pass begins."""
        ids_T = tokens.ids_T[tokens.number_T < self.count]
        if len(ids_T):
            self._ids.append(ids_T.cpu())

    def add(self, seen: Seen) -> None:
        """Adds what one FFN decided in a forward pass."""
        keep_T = seen.number_T < self.count
        if not keep_T.any():
            return
        nothing_T = torch.full(keep_T.shape, torch.nan, device=keep_T.device)
        share_T = nothing_T if seen.norm_TE is None else captured_T(seen)
        fields = (seen.number_T, seen.scores_TE.float(), seen.mask_TE, seen.margin_TE, share_T)
        self._parts[seen.ffn.name].append(Decisions(*(value[keep_T].cpu() for value in fields)))

    @property
    def ids_T(self) -> Tensor:
        """Token ids of the kept tokens."""
        return torch.cat(self._ids) if self._ids else torch.zeros(0, dtype=torch.int64)

    def of(self, name: str) -> Decisions | None:
        """The decisions of an FFN; None if it saw none of the tokens."""
        parts = self._parts[name]
        return Decisions(*map(torch.cat, zip(*parts, strict=True))) if parts else None
