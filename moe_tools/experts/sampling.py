"""A sample of many rows, spread evenly and at no period.

Every n-th token is no sample: blocks have one length and begin alike, with BOS or with a token that
has nothing before it, and routers treat these as no other. Where n divides the length, a share of
1/512 of the tokens is n/512 of the sample: two points of sparsity on Gemma-3-270M (LOG.md,
2026-11-30).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, less their whole numbers, fill 0 to 1 evenly, however many they are."""


def sample_rows(values_NX: Tensor, most: int) -> Tensor:
    """At most `most` of N rows, in their order, the same for every tensor of as many rows.

    One row of each of `most` equal stretches, each at another place of its stretch.
    """
    rows = len(values_NX)
    if rows <= most:
        return values_NX
    at_S = torch.arange(most, dtype=torch.float64, device=values_NX.device)
    return values_NX[((at_S + at_S * GOLDEN % 1) * (rows / most)).long()]


def sample_share(values_NX: Tensor, share: float) -> Tensor:
    """The same of a share of the rows, rounded up; of 1 and more, all of them."""
    return sample_rows(values_NX, math.ceil(share * len(values_NX)))
