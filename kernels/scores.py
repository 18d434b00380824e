"""What a router decides, as the kernels take it: which experts run, without scores in between.

Letters: T tokens, K numbers that the last product takes, D model width, F neurons, R experts that
are routed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_tools.kernels.few_bits import GROUP
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

    def misfit(self, tokens: torch.Size, neurons: int, width: int) -> str | None:
        """Says what does not fit an FFN and the leading dimensions of its input; None: all does."""
        if self.weight_RK.ndim != 2:
            return f"weight_RK is {tuple(self.weight_RK.shape)}, but has rows and columns"
        routed, entering = self.weight_RK.shape
        if self.z_TK.shape != (*tokens, entering):
            return f"z_TK is {tuple(self.z_TK.shape)}, but must be {(*tokens, entering)}"
        if self.bias_R is not None and self.bias_R.shape != (routed,):
            return f"bias_R is {tuple(self.bias_R.shape)}, but must be {(routed,)}"
        if not 1 <= self.experts <= neurons or self.shared < 0:
            return f"{neurons} neurons cannot make {self.experts} experts, {self.shared} shared"
        return None

    def tensors(self) -> dict[str, Tensor | None]:
        """All tensors, by name."""
        return {"z_TK": self.z_TK, "weight_RK": self.weight_RK, "bias_R": self.bias_R}

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

    def misfit(self, tokens: torch.Size, neurons: int, width: int) -> str | None:
        """Says what does not fit an FFN and the leading dimensions of its input; None: all does."""
        if self.z_TD.shape != (*tokens, width):
            return f"z_TD is {tuple(self.z_TD.shape)}, but must be {(*tokens, width)}"
        if self.norm_F.shape != (neurons,):
            return f"norm_F is {tuple(self.norm_F.shape)}, but must be {(neurons,)}"
        if self.up is not None and self.up.offset != self.gate.offset:
            return f"copies have offsets {self.gate.offset} and {self.up.offset}, but must have one"
        groups = (neurons, -(-width // GROUP))
        for rows in (self.gate, self.up):
            found = None if rows is None or rows.scale_FG is None else tuple(rows.scale_FG.shape)
            if rows is not None and found != groups:
                return f"a copy has scales of {found}, but must have {groups}"
        return None

    def tensors(self) -> dict[str, Tensor | None]:
        """All tensors, by name."""
        up = None if self.up is None else self.up.stored
        return {"z_TD": self.z_TD, "norm_F": self.norm_F, "a copy": self.gate.stored, "up": up}


Scores = LinearScores | FewBitScores
