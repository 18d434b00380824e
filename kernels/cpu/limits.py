"""Chooses the fastest way: that of few tokens, that of many tokens, or matrix products.

Few tokens share every row that one of them wants (what takes the time is reading); of many, only
those that want a row are multiplied with it (what takes the time is arithmetic). The limits are
where the ways cross on Zen 5 with two threads (LOG.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """Up to where each way is taken, as `Limits` of csrc/sparse_ffn.h."""

    few: int
    """The most tokens, 16 or fewer, for which the way of few tokens is taken."""
    most_few: float
    """The share of neurons, wanted by one of few tokens, above which matrix products are faster."""
    most_many: float
    """The share of pairs of one of many tokens and a neuron that it wants, above which they are."""

    def without_dense(self) -> Limits:
        """Returns limits that never choose matrix products, whatever the speed."""
        return self._replace(most_few=1.0, most_many=1.0)


FEW = 8
"""Tokens for which the kernels read all rows faster than a matrix product would."""
MOST_BF16 = ((16, 1.0), (64, 0.6))
"""(most tokens, `most_many` up to there), by number of tokens."""
MOST_BF16_BEYOND = 0.45
"""`most_many` for more tokens. With all neurons on, PyTorch is twice as fast as we in bf16."""
NARROW = 1024
"""Below this width the shares are halved: products are short, and what surrounds them counts."""


ALWAYS = Limits(FEW, 1.0, 1.0)
"""The limits where a matrix product is never faster."""


def limits_for(weights: torch.dtype, x: torch.dtype, tokens: int, width: int) -> Limits:
    """Returns the limits for these dtypes, number of tokens and width.

    Only weights stored in the bf16 of x have a matrix product that is faster than the kernels:
    that of fp32 is not on this machine, and the others would be converted at every call.
    """
    if not weights == x == torch.bfloat16:
        return ALWAYS
    share = next((share for most, share in MOST_BF16 if tokens <= most), MOST_BF16_BEYOND)
    return Limits(FEW, 1.0, share if width >= NARROW else share / 2)
