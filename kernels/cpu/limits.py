"""Chooses the fastest way: that of few tokens, that of many tokens, or matrix products.

Few tokens share every row that one of them wants (what takes the time is reading); of many, only
those that want a row are multiplied with it (what takes the time is arithmetic). Where the ways
cross is measured once on every machine (`inference/measured_limits.py`); until then tables of Zen 5
with two threads are in force (LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_tools.kernels.quantize import INT4


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
NARROW = 1024
"""Below this width products are short, and what surrounds them counts."""
TOKENS = (16, 64, 256)
"""Numbers of tokens that `Table` knows; one between two of them counts as the larger one."""

ALWAYS = Limits(FEW, 1.0, 1.0)
"""The limits where a matrix product is never faster."""


@dataclass(frozen=True)
class Table:
    """`most_many` of each of `TOKENS`, the last one of all more, too."""

    narrow: tuple[float, float, float]
    """Of models narrower than `NARROW`."""
    wide: tuple[float, float, float]

    def share(self, tokens: int, width: int) -> float:
        """The limit for so many tokens of this width."""
        shares = self.wide if width >= NARROW else self.narrow
        found = zip(TOKENS, shares, strict=True)
        return next((share for most, share in found if tokens <= most), shares[-1])


_OF_CODES = Table(narrow=(1.0, 0.8, 0.3), wide=(1.0, 1.0, 0.5))
BUILT_IN = {
    torch.bfloat16: Table(narrow=(0.5, 0.3, 0.225), wide=(1.0, 0.6, 0.45)),
    torch.int8: _OF_CODES,
    INT4: _OF_CODES,
}
"""By the dtype of the weights. Codes are made bf16 at every call."""
in_force = dict(BUILT_IN)


def limits_for(weights: torch.dtype, x: torch.dtype, tokens: int, width: int) -> Limits:
    """Returns the limits for these dtypes, number of tokens and width.

    Only products of bf16 are faster than the kernels: those of fp32 are not on any machine that was
    measured.
    """
    if x != torch.bfloat16 or weights not in in_force:
        return ALWAYS
    return Limits(FEW, 1.0, in_force[weights].share(tokens, width))
