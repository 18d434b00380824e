"""The operands of one call, and what follows from their shapes.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS
from moe_tools.kernels.triton.config import Config, pinned, tokens_of_a_program

BIASES = ("gate_F", "up_F", "down_D")
SCALES = ("gate_scale_FG", "up_scale_FG", "down_scale_FG")
CONTIGUOUS = ("x_TD", "mask_TE", "off_F", "residual_TD", *BIASES, *SCALES)
"""Operands of which the kernels see no strides."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One FFN and its input. A plain FFN has no `up`: its one projection stands in `gate`.

    Rows in few bits are wider or narrower than D, see `stored.Rows`.

    Weights may also be (X, N, D), F = X N: the experts of an MoE host, X of N neurons. Gate and up
    may then stand in one tensor, expert by expert; the rows of `down` follow each other.

    The operands in `CONTIGUOUS` are; rows may lie any number of elements apart.
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
    gate_scale_FG: Tensor | None = None
    """Scales belong to weights in eight and four bits, see `stored.Rows`."""
    up_scale_FG: Tensor | None = None
    down_scale_FG: Tensor | None = None
    off_F: Tensor | None = None
    """What is taken from h of a neuron that runs, since `down_D` has it for all neurons."""
    residual_TD: Tensor | None = None
    """Added to y, in the dtype of x."""
    act: str = "silu"
    up_act: str = "identity"
    threshold: float = 0.0
    up_threshold: float = 0.0
    gate_first: bool = False
    """Compute act(gate x) first and list only the neurons where it is not zero."""
    atomic: bool = False
    config: Config | None = None
    tickets: bool = field(default_factory=lambda: torch.version.hip is None)
    """Whether launch three adds its own shares; not on AMD, see `combine`."""

    def __post_init__(self) -> None:
        for name in CONTIGUOUS:
            one = getattr(self, name)
            assert one is None or one.is_contiguous(), f"{name} has strides {one.stride()}"

    @cached_property
    def sizes(self) -> dict[str, int]:
        """T, D, F and E as the kernels take them."""
        tokens, width = self.x_TD.shape
        experts = 1 if self.mask_TE is None else self.mask_TE.shape[1]
        return {"T": tokens, "D": width, "F": self.neurons, "E": experts}

    @cached_property
    def mask_sizes(self) -> dict[str, int]:
        """T, F and E: the sizes that kernels without x and weights take."""
        return {name: size for name, size in self.sizes.items() if name != "D"}

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
        return {"threshold": self.threshold, "up_threshold": self.up_threshold, **names}

    @cached_property
    def stages(self) -> int:
        """Steps in flight of the loops over weights.

        One for codes: a pipeline would copy eight bytes a thread, not 16.
        """
        return 1 if self.codes else 2

    @cached_property
    def codes(self) -> bool:
        """Whether the weights are stored in eight or four bits."""
        return self.gate_scale_FG is not None

    @cached_property
    def skips_zeros(self) -> bool:
        """Whether a neuron that launch one has listed may still turn out to be zero."""
        return self.up_act in GIVES_ZEROS or (self.act in GIVES_ZEROS and not self.gate_first)

    @cached_property
    def learns_mask(self) -> bool:
        """Whether the mask has a gradient; one of booleans has none."""
        return self.mask_TE is not None and self.mask_TE.dtype.is_floating_point

    @cached_property
    def tokens(self) -> int:
        """How many tokens one program computes together."""
        return tokens_of_a_program(len(self.x_TD))

    @cached_property
    def token_tiles(self) -> int:
        """How many tiles the tokens make, each with a list of its own."""
        return -(-len(self.x_TD) // self.tokens)

    @cached_property
    def tiling(self) -> Config:
        """The tile sizes, fitted to the shape."""
        config = self.config or pinned(self.tokens, self.codes)
        return config.fitted(self.tokens, self.x_TD.shape[1])

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask as numbers a kernel can load."""
        if self.mask_TE is None or self.mask_TE.dtype != torch.bool:
            return self.mask_TE
        return self.mask_TE.view(torch.uint8)

    @property
    def written_TE(self) -> Tensor:
        """The mask of a call that has one."""
        assert self.mask_TE is not None
        return self.mask_TE

    def with_mask(self, experts: int) -> Call:
        """The call with memory for a mask, which launch one writes."""
        mask_TE = self.empty(len(self.x_TD), experts, dtype=torch.uint8)
        return replace(self, mask_TE=mask_TE)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory on the device of x that a kernel will fill."""
        return torch.empty(shape, dtype=dtype, device=self.x_TD.device)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """One value for each token and neuron, neuron by neuron; written where a neuron runs."""
        shape = (self.token_tiles, self.neurons, self.tokens)
        return self.empty(*shape, dtype=dtype or self.x_TD.dtype)
