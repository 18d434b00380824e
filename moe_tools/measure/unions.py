"""Counts what tokens read together: the neurons that run for at least one token of a group.

A pass over several sequences reads each weight once, whoever needs it. The tokens of a group stand
for such sequences, so they are taken from far apart: of n tokens, group i of G = n / size has the
tokens i, i + G, i + 2 G, ... What is left over behind the last whole group is in none.

Letters: T tokens, E experts, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_tools.experts.division import Division

SIZES = (1, 4, 16)
"""Tokens of a group."""


@dataclass
class Union:
    """What groups of tokens read of one FFN, summed over the groups."""

    size: int
    """Tokens of a group."""
    groups: int = 0
    """Those that passed the layer."""
    visits: int = 0
    """Those of which a token came to this FFN: all, but for an expert of an MoE host."""
    neurons: int = 0
    """Neurons with a router of ours that ran for a token of the group."""
    experts: int = 0
    """Experts that are routed by it and did."""

    def add(self, place_T: Tensor, tokens: int) -> None:
        """Counts who came.

        Args:
            place_T: which tokens of the pass came to this FFN.
            tokens: of the pass.
        """
        here_T1 = torch.ones(len(place_T), 1, dtype=torch.bool, device=place_T.device)
        self.visits += int(union(here_T1, place_T, tokens, self.size).sum())

    def add_mask(
        self, mask_TE: Tensor, division: Division, shared: int, place_T: Tensor, tokens: int
    ) -> None:
        """Counts who came, and what ran.

        Args:
            mask_TE: which experts run for the tokens that came.
            division: sizes of the experts.
            shared: experts in front that always run.
            place_T: as in `add`.
            tokens: as in `add`.
        """
        self.add(place_T, tokens)
        union_GE = union(mask_TE, place_T, tokens, self.size)
        self.neurons += division.count(union_GE)
        self.experts += int(union_GE[:, shared:].sum())


def union(mask_TE: Tensor, place_T: Tensor, tokens: int, size: int) -> Tensor:
    """union_GE: whether an entry is on for any token of a group.

    Args:
        mask_TE: of some tokens.
        place_T: which of the pass these are.
        tokens: of the pass.
        size: tokens of a group.
    """
    groups = tokens // size
    if not groups:
        return mask_TE[:0]
    inside_T = place_T < groups * size
    found_GE = torch.zeros(groups, mask_TE.shape[-1], dtype=torch.int8, device=mask_TE.device)
    found_GE.index_add_(0, place_T[inside_T] % groups, mask_TE[inside_T].to(torch.int8))
    return found_GE > 0
