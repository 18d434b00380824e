"""What the kernels compute, each as a way that a test can run, capture, or put on a stream.

Letters: T tokens, D model width, F neurons, E experts of an FFN, X experts of an MoE host, N
neurons of one of them, K experts of one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.moe import ExpertWeights, moe_ffn
from moe_tools.kernels.quantize import INT4
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.sparse_ffn import pack, sparse_ffn
from moe_tools.kernels.weights import FFNWeights

TOKENS, FEW, MANY = 3, 5, 100
"""Of an FFN; of an MoE host, under a mask and grouped by expert."""
HOST_EXPERTS, CHOSEN = 8, 2
SIZES = {"cpu": (24, 37, 5), "cuda": (512, 4096, 64)}
"""Device -> D, F and E; on a card, enough that many programs run at the same time."""


@dataclass(frozen=True)
class Way:
    """One FFN, or the experts of one layer, on one device."""

    run: Callable[..., Tensor]
    """Computes y_TD of what `draw` gives."""
    draw: Callable[[], tuple[Tensor, ...]]
    """x_TD and a choice of experts, others in every call."""
    exact: Callable[..., Tensor]
    """y_TD of the same, by the reference in fp32 on the CPU."""
    weights: tuple[Tensor, ...] = ()
    """What has gradients; nothing where packed."""

    def gradients(self, x_TD: Tensor, *choice: Tensor) -> list[Tensor]:
        """y_TD, and the gradients of its sum for x and the weights."""
        x_TD = x_TD.detach().requires_grad_()
        y_TD = self.run(x_TD, *choice)
        return [y_TD, *torch.autograd.grad(y_TD.sum(), (x_TD, *self.weights))]


@dataclass(frozen=True)
class Maker:
    """Makes ways."""

    dtype: torch.dtype
    place: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, F and E."""
        return SIZES[torch.device(self.place).type]

    def rows(self, *shape: int) -> Tensor:
        """Random rows of a length of about one."""
        return (torch.randn(shape) * shape[-1] ** -0.5).to(self.place, self.dtype)

    def inputs(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.sizes[0]).to(self.place, self.dtype)

    def masked(self) -> tuple[Tensor, Tensor]:
        """x_TD, and some experts for each token."""
        mask_TE = torch.rand(TOKENS, self.sizes[2]) < 0.3
        return self.inputs(TOKENS), mask_TE.to(self.place)

    def weights(self, act: str) -> FFNWeights:
        width, neurons, _ = self.sizes
        gate_FD, up_FD, down_FD = (self.rows(neurons, width) for _ in range(3))
        return FFNWeights(up_FD, down_FD, act, gate_FD)

    def ffn(self, act: str, *, masked: bool) -> Way:
        """`sparse_ffn`, whose weights have gradients."""
        weights = self.weights(act)
        leaves = tuple(one.requires_grad_() for one in weights.matrices())

        def run(x_TD: Tensor, mask_TE: Tensor | None = None) -> Tensor:
            options: dict[str, Any] = {"act": act, "gate_FD": weights.gate_FD}
            rows = (weights.up_FD, weights.down_FD)
            return sparse_ffn(x_TD, *rows, mask_TE, **options, backend="triton")

        draw = self.masked if masked else lambda: (self.inputs(TOKENS),)
        return Way(run, draw, reference_of(weights), leaves)

    def packed(self, dtype: torch.dtype) -> Way:
        """`pack`, once."""
        weights = self.weights("silu")
        packed = pack(weights, dtype=dtype, backend="triton")
        return Way(packed, self.masked, reference_of(weights))

    def host(self, tokens: int) -> Way:
        """`moe_ffn`."""
        width, neurons, _ = self.sizes
        shape = (HOST_EXPERTS, neurons // HOST_EXPERTS, width)
        leaves = tuple(self.rows(*shape).requires_grad_() for _ in range(3))
        experts = ExpertWeights(*leaves, "silu")

        def exact(*operands: Tensor) -> Tensor:
            on_cpu = ExpertWeights(*map(exactly, leaves), "silu")
            return moe_ffn(on_cpu, *map(exactly, operands), backend="reference")

        def draw() -> tuple[Tensor, ...]:
            chosen_TK = torch.rand(tokens, HOST_EXPERTS).topk(CHOSEN).indices
            weight_TK = torch.rand(tokens, CHOSEN)
            return self.inputs(tokens), chosen_TK.to(self.place), weight_TK.to(self.place)

        return Way(lambda *given: moe_ffn(experts, *given, backend="triton"), draw, exact, leaves)


def exactly(tensor: Tensor) -> Tensor:
    """In fp32 on the CPU; a choice stays one."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def reference_of(weights: FFNWeights) -> Callable[..., Tensor]:
    def exact(x_TD: Tensor, mask_TE: Tensor | None = None) -> Tensor:
        on_cpu = None if mask_TE is None else exactly(mask_TE)
        return sparse_ffn_reference(weights.changed(exactly, exactly), exactly(x_TD), on_cpu)

    return exact


def error(y_TD: Tensor, expected_TD: Tensor) -> float:
    """Relative to what was expected, over all of it."""
    return float((exactly(y_TD) - expected_TD).norm() / expected_TD.norm())


WAYS: dict[str, Callable[[Maker], Way]] = {
    "experts": lambda make: make.ffn("silu", masked=True),
    "exact gate": lambda make: make.ffn("relu", masked=False),
    "exact gate of experts": lambda make: make.ffn("relu", masked=True),
    "packed": lambda make: make.packed(make.dtype),
    "int8": lambda make: make.packed(torch.int8),
    "int4": lambda make: make.packed(INT4),
    "few tokens of a host": lambda make: make.host(FEW),
    "many tokens of a host": lambda make: make.host(MANY),
}
LEARN = [name for name in WAYS if name not in ("packed", "int8", "int4")]
"""Those with gradients."""

every_way = pytest.mark.parametrize("name", WAYS)
every_way_that_learns = pytest.mark.parametrize("name", LEARN)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(name: str, dtype: torch.dtype, place: str) -> Way:
    return WAYS[name](Maker(dtype, place))


def tolerance(name: str, dtype: torch.dtype) -> float:
    """The `error` that a dtype may make, and what the weights are stored in."""
    stored = {"int8": 0.02, "int4": 0.2}
    return {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] + stored.get(name, 0.0)
