"""The operands of one call, what follows from their shapes, and the memory the kernels share.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS
from moe_tools.kernels.triton.config import Config, next_power, pinned, tokens_of_a_program


@dataclass(frozen=True)
class Call:
    """One FFN and its input. A plain FFN has no `up`: its one projection stands in `gate`.

    Weights may also be (X, N, D), F = X N: the experts of an MoE host, X of N neurons. Gate and up
    may then stand in one tensor, expert by expert; the rows of `down` follow each other.
    """

    x_TD: Tensor
    gate_FD: Tensor
    """The rows under the activation."""
    up_FD: Tensor | None
    """The rows that multiply it."""
    down_FD: Tensor
    mask_TE: Tensor | None
    gate_F: Tensor | None = None
    up_F: Tensor | None = None
    down_D: Tensor | None = None
    gate_scale_F: Tensor | None = None
    """Of int8 weights: a row stands for its numbers times its scale."""
    up_scale_F: Tensor | None = None
    down_scale_F: Tensor | None = None
    act: str = "silu"
    up_act: str = "identity"
    theta: float = 0.0
    up_theta: float = 0.0
    gate_first: bool = False
    """Compute act(gate x) first and list only the neurons where it is not zero."""
    atomic: bool = False
    config: Config | None = None
    tickets: bool = field(default_factory=lambda: torch.version.hip is None)
    """Whether launch three adds its own shares; not on AMD, see `combine`."""

    def __post_init__(self) -> None:
        vectors = ("gate_F", "up_F", "down_D", "gate_scale_F", "up_scale_F", "down_scale_F")
        for name in vectors:
            vector = getattr(self, name)
            assert vector is None or vector.is_contiguous(), f"{name} has strides {vector.stride()}"

    @classmethod
    def of(cls, *operands: Any, config: Sequence[int]) -> Call:
        """From what an operator's schema can say: the fields in order, a config as numbers."""
        return replace(cls(*operands), config=Config(*config) if config else None)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """T, D, F and E as the kernels take them."""
        tokens, width = self.x_TD.shape
        experts = 1 if self.mask_TE is None else self.mask_TE.shape[1]
        return {"T": tokens, "D": width, "F": self.neurons, "E": experts}

    @cached_property
    def neurons(self) -> int:
        """F, of all experts of a host together."""
        return self.gate_FD.shape[:-1].numel()

    @cached_property
    def grouping(self) -> dict[str, int]:
        """How the rows of gate and up stand, see `rows.row_of`."""
        if self.gate_FD.ndim == 2:
            return {"group": self.neurons, "skip": 0}
        _, group, _ = self.gate_FD.shape
        return {"group": group, "skip": self.gate_FD.stride(0) // self.gate_FD.stride(1) - group}

    @cached_property
    def activation(self) -> dict[str, Any]:
        """The two activations as launch two takes them."""
        names = {"ACT": self.act, "UP_ACT": self.up_act, "GATED": self.up_FD is not None}
        return {"theta": self.theta, "up_theta": self.up_theta, **names}

    @cached_property
    def stages(self) -> int:
        """Of the loops over weights. A pipeline would copy int8 eight bytes a thread, not 16."""
        return 1 if self.int8 else 2

    @cached_property
    def int8(self) -> bool:
        """Whether the weights are."""
        return self.gate_FD.dtype == torch.int8

    @cached_property
    def skips_zeros(self) -> bool:
        """Whether a neuron that launch one has listed may still turn out to be zero."""
        return self.up_act in GIVES_ZEROS or (self.act in GIVES_ZEROS and not self.gate_first)

    @cached_property
    def tokens(self) -> int:
        """Of one program."""
        return tokens_of_a_program(len(self.x_TD))

    @cached_property
    def token_tiles(self) -> int:
        """Each with a list of its own."""
        return -(-len(self.x_TD) // self.tokens)

    @cached_property
    def tiling(self) -> Config:
        """The tile sizes, fitted to the shape."""
        config = self.config or pinned(self.tokens, self.int8)
        return config.fitted(self.tokens, self.x_TD.shape[1])

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask as numbers a kernel can load."""
        if self.mask_TE is None or self.mask_TE.dtype != torch.bool:
            return self.mask_TE
        return self.mask_TE.view(torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that a kernel fills."""
        return torch.empty(shape, dtype=dtype, device=self.x_TD.device)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """One value for each token and neuron, neuron by neuron; written where a neuron runs."""
        shape = (self.token_tiles, self.neurons, self.tokens)
        return self.empty(*shape, dtype=dtype or self.x_TD.dtype)


@dataclass(frozen=True)
class Lists:
    """What launch one writes, and the packed list that launch two makes of it."""

    tile: int
    """Neurons of one tile."""
    num_tiles: int
    columns: int
    """Tiles of columns of launch three, each with a ticket."""
    neurons: Tensor
    counts: Tensor
    packed: Tensor
    tickets: Tensor

    @classmethod
    def of(cls, call: Call, tile: int) -> Lists:
        """Memory for the lists of a call."""
        num_tiles = -(-call.neurons // tile)
        columns = -(-call.x_TD.shape[1] // call.tiling.down_columns)
        sizes = (num_tiles * tile, num_tiles, call.neurons, columns)
        made = [call.empty(call.token_tiles, size, dtype=torch.int32) for size in sizes]
        return cls(tile, num_tiles, columns, *made)

    @property
    def for_launch_one(self) -> dict[str, Any]:
        """Arguments by name."""
        return {
            "neurons": self.neurons,
            "counts": self.counts,
            "tickets": self.tickets,
            "num_columns": self.columns,
            "TILE": self.tile,
            "COLUMNS": next_power(self.columns),
        }

    @property
    def for_launch_two(self) -> dict[str, Any]:
        """Arguments by name."""
        return {
            "neurons": self.neurons,
            "counts": self.counts,
            "packed": self.packed,
            "num_tiles": self.num_tiles,
            "TILE": self.tile,
            "TILES": next_power(self.num_tiles),
        }
