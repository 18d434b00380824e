"""What a router decides, as the kernels take it: which experts run, without scores in between.

Letters: T tokens, K numbers that the last product takes, D model width, F neurons, R experts that
are routed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_tools.kernels.triton.stored import Rows


class LinearScores(NamedTuple):
    """An expert runs where sigmoid(W z + b) > above, in fp32 (LTE, arXiv 2402.06126)."""

    z_TK: Tensor
    """x, or what earlier layers of the router made of it; leading dimensions may be several."""
    weight_RK: Tensor
    bias_R: Tensor | None
    above: float
    shared: int = 0
    """The first experts, which are not scored, always run."""

    @property
    def experts(self) -> int:
        """How many there are, the shared ones included."""
        return self.shared + len(self.weight_RK)


class FewBitScores(NamedTuple):
    """A neuron runs where |h~| norm > above (Prox, arXiv 2607.27591, with one norm more).

    h~ is the FFN's own formula on copies of its rows in few bits.
    """

    z_TD: Tensor
    """x, rounded or thinned out as the proposal takes it."""
    gate: Rows
    """In a plain FFN the copy of its one projection, and `up` is None."""
    up: Rows | None
    norm_F: Tensor
    above: float


Scores = LinearScores | FewBitScores
