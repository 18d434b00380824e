"""Aggregates an FFN's decisions: a few numbers for each expert, however many tokens there are.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.experts.experts import ExpertFFN
from moe_tools.inspection.histogram import Histogram
from moe_tools.inspection.responses import Responses
from moe_tools.inspection.watch import AFTER, BEFORE, Seen

NEAR = 0.05
"""A score this close to the threshold is a near decision."""
MOST_PAIRED = 1024
"""Experts of an FFN of which pairs are counted: E x E counts, 8 MB."""
ROWS = 4096
"""Tokens of which pairs are counted at once: counts in fp32 stay exact."""


class Tally:
    """The aggregated decisions of one FFN."""

    def __init__(self, ffn: ExpertFFN, top: int) -> None:
        experts = ffn.division.num_experts
        self.division, self.shared = ffn.division, ffn.shared
        self.tokens = 0
        self.neurons_on = 0
        self.load_E = torch.zeros(experts, dtype=torch.int64)
        """How many tokens selected each expert."""
        self.score_E = torch.zeros(experts, dtype=torch.float64)
        """Sum of each expert's scores."""
        self.norm_E = torch.zeros(experts, dtype=torch.float64)
        """Sum of each expert's output norms."""
        self.captured = 0.0
        """Captured share of the output norms, summed over the measured tokens."""
        self.measured = 0
        self.pairs_EE = (
            torch.zeros(experts, experts, dtype=torch.int64) if experts <= MOST_PAIRED else None
        )
        self.margins = Histogram()
        self.near = 0
        """Decisions about routed experts within `NEAR` of the threshold."""
        self.responses = Responses(experts, top, BEFORE + 1 + AFTER)

    def add(self, seen: Seen) -> None:
        """Adds what the FFN decided in a forward pass."""
        self.tokens += len(seen.mask_TE)
        self.neurons_on += self.division.count(seen.mask_TE)
        self.load_E += seen.mask_TE.sum(0).cpu()
        self.score_E += seen.scores_TE.sum(0, dtype=torch.float64).cpu()
        self.margins.add(seen.margin_TE[:, self.shared :])
        self.near += int((seen.margin_TE.abs() < NEAR).sum())
        self.responses.add(seen)
        if self.pairs_EE is not None:
            for rows_TE in seen.mask_TE.float().split(ROWS):
                self.pairs_EE += (rows_TE.T @ rows_TE).long().cpu()
        if seen.norm_TE is not None:
            self.norm_E += seen.norm_TE.sum(0, dtype=torch.float64).cpu()
            self.captured += captured_T(seen).sum(dtype=torch.float64).item()
            self.measured += len(seen.norm_TE)


def captured_T(seen: Seen) -> Tensor:
    """Share of all experts' output norms that the selected ones have; 1 where all are 0."""
    assert seen.norm_TE is not None
    total_T = seen.norm_TE.sum(1)
    part_T = (seen.norm_TE * seen.mask_TE).sum(1)
    return torch.where(total_T > 0, part_T / total_T, 1.0)
