"""Which way is the fastest: few tokens, many tokens, or matrix products. Letters: T tokens.

Few tokens share every row that one of them wants (what takes the time is reading); of many, only
those that want a row are multiplied with it (what takes the time is arithmetic). The limits are
where the ways cross on Zen 5 with two threads (LOG.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """In the order of csrc/sparse_ffn.h."""

    few: int
    """Tokens, at most 16, up to which the way of the few is taken."""
    most_few: float
    """Share of the neurons, wanted by some of the few, above which a matrix product is faster."""
    most_many: float
    """The same of the products of all tokens with all neurons, for many."""

    def without_dense(self) -> Limits:
        """No matrix products, whatever the speed."""
        return self._replace(most_few=1.0, most_many=1.0)


FEW = 8
"""Tokens for which the kernels read all rows faster than a matrix product would."""
MOST_BF16 = ((16, 1.0), (64, 0.6))
"""(tokens up to which, share of the products)."""
MOST_BF16_BEYOND = 0.45
"""bf16 has matrix products of its own, twice as fast as ours where nothing is left out."""
NARROW = 1024
"""Width below which the products are soon made, and what is around them halves the shares."""


ALWAYS = Limits(FEW, 1.0, 1.0)
"""No matrix product is ever faster."""


def limits_for(weights: torch.dtype, x: torch.dtype, tokens: int, width: int) -> Limits:
    """What is fastest for weights stored and x given so.

    Only weights stored in the bf16 of x have a matrix product that is faster than the kernels:
    that of fp32 is not on this machine, and the others would be converted at every call.
    """
    if not weights == x == torch.bfloat16:
        return ALWAYS
    share = next((share for most, share in MOST_BF16 if tokens <= most), MOST_BF16_BEYOND)
    return Limits(FEW, 1.0, share if width >= NARROW else share / 2)
