"""Which way is the fastest: few tokens, many tokens, or matrix products. Letters: T tokens.

Few tokens share every row that one of them wants (what takes the time is reading); of many, only
those that want a row are multiplied with it (what takes the time is arithmetic).
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
        return self._replace(most_few=1.0, most_many=float("inf"))


def limits_for(weights: torch.dtype, x: torch.dtype) -> Limits:
    """Where the ways cross, as measured with `moe-tools bench kernels` on Zen 5 (LOG.md)."""
    if weights == x == torch.bfloat16:
        return Limits(4, 1.0, 0.6)
    return Limits(4, 1.0, float("inf"))
