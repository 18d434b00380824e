"""Keeps the tokens of a stream that each expert scores highest.

Letters: T tokens, E experts, K tokens kept an expert, C tokens of context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.inspection.watch import NOTHING, Seen


class Responses:
    """The `top` tokens of every expert with their context; of equal scores, earlier passes'."""

    def __init__(self, num_experts: int, top: int, width: int) -> None:
        self.top = top
        self.score_EK = torch.full((num_experts, top), -torch.inf)
        self.number_EK = torch.full((num_experts, top), NOTHING)
        self.selected_EK = torch.zeros(num_experts, top, dtype=torch.bool)
        self.window_EKC = torch.full((num_experts, top, width), NOTHING, dtype=torch.int32)

    def add(self, seen: Seen) -> None:
        """Adds what one FFN decided in a forward pass."""
        if not len(seen.row_T) or not self.top:
            return
        score_EK, index_EK = _highest(seen.scores_TE.float().T, self.top)
        row_EK = seen.row_T[index_EK]
        self._merge(
            score_EK.cpu(),
            seen.tokens.number_T[row_EK].cpu(),
            seen.mask_TE.T.gather(1, index_EK).cpu(),
            seen.tokens.window_TC[row_EK].int().cpu(),
        )

    def _merge(
        self, score_EK: Tensor, number_EK: Tensor, selected_EK: Tensor, window_EKC: Tensor
    ) -> None:
        both_EK = torch.cat([self.score_EK, score_EK], 1)
        ranked = both_EK.sort(dim=1, descending=True, stable=True)
        self.score_EK, index_EK = ranked.values[:, : self.top], ranked.indices[:, : self.top]
        self.number_EK = torch.cat([self.number_EK, number_EK], 1).gather(1, index_EK)
        self.selected_EK = torch.cat([self.selected_EK, selected_EK], 1).gather(1, index_EK)
        windows = torch.cat([self.window_EKC, window_EKC], 1)
        index_EKC = index_EK[..., None].expand(-1, -1, windows.shape[-1])
        self.window_EKC = windows.gather(1, index_EKC)


def _highest(score_ET: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and places of the highest scores, the highest first."""
    found = score_ET.topk(min(count, score_ET.shape[1]), dim=1)
    return found.values, found.indices
