"""The operands of one call with tokens grouped by expert, and what follows from their shapes.

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token, P
pairs: T K of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.triton.config import GROUPED, Config, next_power
from moe_tools.kernels.triton.config import MOST_TOGETHER as TOKENS


@dataclass(frozen=True, kw_only=True)
class GroupedCall:
    """The experts of one layer, and tokens that chose K of them each."""

    x_TD: Tensor
    gate_XND: Tensor
    up_XND: Tensor
    down_XND: Tensor
    chosen_TK: Tensor
    weight_TK: Tensor
    act: str = "silu"
    up_act: str = "identity"
    threshold: float = 0.0
    up_threshold: float = 0.0
    config: Config | None = None

    @cached_property
    def tiling(self) -> Config:
        """The tile sizes, fitted to the shape."""
        return (self.config or GROUPED).fitted(TOKENS, self.x_TD.shape[1])

    @cached_property
    def num_pairs(self) -> int:
        """P: every token makes K pairs."""
        return self.chosen_TK.numel()

    @cached_property
    def neurons(self) -> int:
        """N: how many neurons one expert has."""
        return self.gate_XND.shape[1]

    @cached_property
    def tiles(self) -> int:
        """The most tiles that the pairs can make: every expert may leave one unfilled."""
        return -(-self.num_pairs // TOKENS) + len(self.gate_XND)

    @cached_property
    def blocks(self) -> int:
        """How many programs share the neurons of one expert when h is computed."""
        return -(-self.neurons // self.tiling.rows)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Sizes that every launch behind the first takes."""
        (tokens, width), experts = self.x_TD.shape, len(self.gate_XND)
        numbers = {"T": tokens, "D": width, "N": self.neurons, "X": experts, "P": self.num_pairs}
        return {**numbers, "BLOCK_T": TOKENS, "EXPERTS": next_power(experts)}

    @cached_property
    def activation(self) -> dict[str, Any]:
        """The two activations as the kernels take them."""
        names = {"ACT": self.act, "UP_ACT": self.up_act}
        return {"threshold": self.threshold, "up_threshold": self.up_threshold, **names}

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory on the device of x that a kernel will fill."""
        return torch.empty(shape, dtype=dtype, device=self.x_TD.device)

    def values(self) -> Tensor:
        """Memory for one value of each neuron and each pair of a tile."""
        return self.empty(self.tiles, self.neurons, TOKENS, dtype=self.x_TD.dtype)

    def by_pair(self) -> Tensor:
        """Memory for what each pair adds to a row of D numbers, in fp32."""
        return self.empty(self.num_pairs, self.x_TD.shape[1], dtype=torch.float32)
