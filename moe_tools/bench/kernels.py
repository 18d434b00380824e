"""Time of one FFN, dense and sparse, in one interleaved run, beside the byte limit.

Decoding reads weights: the limit is the bytes that must be read over the memory's bandwidth. Hence
no weights are met again in a cache: calls go in turn over layers of more than 1.5 GB, each with
experts of its own choice.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from moe_tools.bench.ffn import widths
from moe_tools.bench.read_rate import read_rate
from moe_tools.bench.rounds import in_turn, seconds
from moe_tools.bench.ways import (
    BASELINE,
    FATRELU,
    SILU,
    SPARSITIES,
    Call,
    KernelTiming,
    Way,
    dense_ffn,
    ffn_size,
    random_ffn,
    random_input,
    random_masks,
    timings,
    with_gates_off,
)
from moe_tools.experts.division import Division
from moe_tools.kernels.activations import Act
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import INT4, QUANTIZED
from moe_tools.kernels.sparse_ffn import backends as backends  # `doctor` shows them
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

ROTATED = 1_600_000_000
"""Bytes of weights that calls go over in turn: more than any cache holds."""
WARM_UP = 2
"""Rounds before the first that counts: they warm allocators and page tables."""
SIGMAS = 4.0
"""Margin of the screened gate."""
BITS = {
    torch.float32: 32,
    torch.bfloat16: 16,
    torch.float16: 16,
    torch.int8: 8,
    INT4: 4.5,
}
"""Bits of a weight; in int4 a group of 32 has a scale of 16."""


def bench_kernels(
    shape: str,
    *,
    expert_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    packed: Sequence[torch.dtype] = (),
    batches: Sequence[int] = (1,),
    repeats: int = 30,
    rotated: int = ROTATED,
) -> Iterator[KernelTiming]:
    """Times dense ways and, at `SPARSITIES`, sparse ones, for every packed dtype and batch.

    Args:
        shape: a name of `SHAPES`, or DxF.
        expert_size: neurons.
        dtype: of x and of the dense weights, which are the baseline throughout.
        packed: of the weights of the sparse ways; `dtype` by default.
        batches: tokens of a call.
        repeats: that count.
        rotated: bytes of weights, as the dense ways read them.

    Raises:
        ValueError: an unknown shape, or experts larger than its neurons.
    """
    width, neurons = widths(shape)
    Division.of_size(neurons, expert_size)
    bandwidth = read_rate("cpu", rotated)
    for kind in packed or (dtype,):
        layers = _Layers(width, neurons, dtype, kind, rotated)
        for tokens in batches:
            layers.set_tokens(tokens)
            ways = list(layers.dense())
            for sparsity in SPARSITIES:
                ways += layers.sparse(sparsity, expert_size)
            calls = [partial(seconds, way.calls[0]) for way in ways]
            with torch.no_grad():
                found = in_turn(calls, repeats, warm_up=WARM_UP)
            yield from timings(ways, found, bandwidth)


class _Layers:
    """As many FFNs as the rotation needs: as torch has them, and packed with two activations.

    A call takes the next layer, whichever way took the one before it: no way finds weights in a
    cache that another left there.
    """

    def __init__(
        self, width: int, neurons: int, dtype: torch.dtype, packed: torch.dtype, rotated: int
    ) -> None:
        self.width, self.neurons, self.dtype, self.packed = width, neurons, dtype, packed
        self.size = ffn_size(width, neurons, dtype)
        count = max(1, math.ceil(rotated / self.size))
        self._layers = [random_ffn(width, neurons, dtype) for _ in range(count)]
        self._turn = cycle(self._layers)
        self._silu, self._fatrelu = self._pack_all(SILU), self._pack_all(FATRELU)
        # A gate that is small already needs no smaller copy.
        self._screened = None if packed in QUANTIZED else self._pack_all(FATRELU, SIGMAS)

    def _pack_all(self, act: Act, screen: float | None = None) -> Iterator[PackedFFN]:
        def packed(gate_FD: Tensor, up_FD: Tensor, down_FD: Tensor) -> PackedFFN:
            weights = FFNWeights(up_FD, down_FD, act, gate_FD)
            return pack(weights, dtype=self.packed, sole=True, screen=screen)

        return cycle([packed(*layer) for layer in self._layers])

    def set_tokens(self, tokens: int) -> None:
        """Draws an input of that many tokens."""
        self.tokens, self.x_TD = tokens, random_input(tokens, self.width, self.dtype)

    def dense(self) -> Iterator[Way]:
        """Yields F.linear, the baseline, and for one token matrix times vector."""

        def by_linear() -> Tensor:
            return dense_ffn(self.x_TD, *next(self._turn))

        def by_mv() -> Tensor:
            (gate_FD, up_FD, down_FD), x_D = next(self._turn), self.x_TD[0]
            h_F = functional.silu(torch.mv(gate_FD, x_D)) * torch.mv(up_FD, x_D)
            return torch.mv(down_FD.view(self.width, self.neurons), h_F)

        yield self._way(BASELINE, self.dtype, 0.0, self.size, by_linear)
        if self.tokens == 1:
            yield self._way("torch.mv", self.dtype, 0.0, self.size, by_mv)

    def sparse(self, sparsity: float, expert_size: int) -> Iterator[Way]:
        """Yields the naive gather, then native ways: experts given, neurons given, gate first."""
        of_bytes = BITS[self.packed] / 8 / self.dtype.itemsize  # of what the dense ways read
        on = 1 - sparsity**self.tokens  # by one token at least
        size, gates = int(self.size * of_bytes * on), int(self.size * of_bytes / 3)
        experts = Division.of_size(self.neurons, expert_size).num_experts
        way = partial(self._way, dtype=self.packed, sparsity=sparsity)
        if self.tokens == 1:
            gathered = int(self.size * on)
            yield self._way("torch gather", self.dtype, sparsity, gathered, self._gather(sparsity))
        yield way(f"experts of {expert_size}", size=size, call=self._routed(sparsity, experts))
        yield way("neurons given", size=size, call=self._routed(sparsity, self.neurons))
        exact = self._exact(sparsity, self._fatrelu)
        yield way("exact gate", size=gates + size * 2 // 3, call=exact)
        if self._screened is not None:
            read, screened = self.neurons * self.width + size, self._exact(sparsity, self._screened)
            yield way("screened gate", size=read, call=screened)

    def _way(
        self, operation: str, dtype: torch.dtype, sparsity: float, size: int, call: Call
    ) -> Way:
        return Way(operation, dtype, self.tokens, sparsity, size, [call])

    def _gather(self, sparsity: float) -> Call:
        masks = self._masks(sparsity, self.neurons)
        picked = cycle([mask_1F[0].nonzero()[:, 0] for mask_1F in masks])

        def call() -> Tensor:
            on, x_D = next(picked), self.x_TD[0]
            gate_ND, up_ND, down_ND = (rows_FD.index_select(0, on) for rows_FD in next(self._turn))
            h_N = functional.silu(torch.mv(gate_ND, x_D)) * torch.mv(up_ND, x_D)
            return torch.mv(down_ND.T, h_N)

        return call

    def _routed(self, sparsity: float, experts: int) -> Call:
        picked = cycle(self._masks(sparsity, experts))
        return lambda: next(self._silu)(self.x_TD, next(picked))

    def _exact(self, sparsity: float, packed: Iterator[PackedFFN]) -> Call:
        x_TD = with_gates_off(self.x_TD, sparsity)
        return lambda: next(packed)(x_TD)

    def _masks(self, sparsity: float, experts: int) -> list[Tensor]:
        """Draws at least one random choice for each layer."""
        count = max(64 if self.tokens == 1 else 4, len(self._layers))
        return random_masks(count, self.tokens, experts, sparsity)
