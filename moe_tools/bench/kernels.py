"""Time of one FFN, dense and sparse, in one interleaved run, beside the byte limit.

Decoding reads weights: the limit is the bytes that must be read over the memory's bandwidth. Hence
no weights are met again in a cache: calls go in turn over layers of more than 1.5 GB, each with
experts of its own choice.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from moe_tools.bench.ffn import widths
from moe_tools.experts.division import Division
from moe_tools.kernels.activations import Act
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import INT4, QUANTIZED
from moe_tools.kernels.sparse_ffn import backends as backends  # `doctor` shows them
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
ROTATED = 1_600_000_000
"""Bytes of weights that calls go over in turn: more than any cache holds."""
WARM_UP = 2
"""Calls before the first that counts: they warm allocators and page tables."""


SIGMAS = 4.0
"""Margin of the screened gate."""
BITS = {
    torch.float32: 32,
    torch.bfloat16: 16,
    torch.float16: 16,
    torch.int8: 8,
    INT4: 4.5,
}
"""Of a weight; in int4 a group of 32 has a scale of 16."""


@dataclass(frozen=True)
class Way:
    """One way to compute the FFN."""

    operation: str
    dtype: torch.dtype
    """Of the weights."""
    sparsity: float
    """Share of the neurons that are off; 0: dense."""
    size: int
    """Bytes that it has to read: rows of neurons that are on, all gates of an exact gate."""
    call: Callable[[], Tensor]


@dataclass(frozen=True)
class KernelTiming:
    """One way to compute a gated FFN: medians over the repeats, all ways in turn."""

    operation: str
    dtype: str
    """Of the weights that it reads."""
    tokens: int
    sparsity: float
    """Share of the neurons that are off, for each token another random choice; 0: dense."""
    ms: float
    speedup: float
    """Median of the time of F.linear over this one's, repeat by repeat."""
    gigabytes_per_second: float
    """Of the weights that have to be read."""
    share_of_bandwidth: float
    """Of what summing up a large tensor reads a second."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


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
    """For every packed dtype and batch the dense ways, and the sparse ones at `SPARSITIES`.

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
    bandwidth = _read_bandwidth(rotated)
    for kind in packed or (dtype,):
        layers = _Layers(width, neurons, dtype, kind, rotated)
        for tokens in batches:
            layers.set_tokens(tokens)
            ways = list(layers.dense())
            for sparsity in SPARSITIES:
                ways += layers.sparse(sparsity, expert_size)
            seconds = _interleaved([way.call for way in ways], repeats)
            for way, own in zip(ways, seconds, strict=True):
                yield _timing(way, tokens, own, seconds[0], bandwidth)


class _Layers:
    """As many FFNs as the rotation needs: as torch has them, and packed with two activations."""

    def __init__(
        self, width: int, neurons: int, dtype: torch.dtype, packed: torch.dtype, rotated: int
    ) -> None:
        self.width, self.neurons, self.dtype, self.packed = width, neurons, dtype, packed
        self.size = 3 * neurons * width * dtype.itemsize
        self._layers = [
            [(torch.randn(neurons, width) / width**0.5).to(dtype) for _ in range(3)]
            for _ in range(max(1, math.ceil(rotated / self.size)))
        ]
        self._turn = cycle(self._layers)
        self._silu = self._pack_all(Act("silu"))
        self._fatrelu = self._pack_all(Act("fatrelu", 1.0))
        screen = None if packed in QUANTIZED else SIGMAS
        self._screened = None if screen is None else self._pack_all(Act("fatrelu", 1.0), screen)

    def _pack_all(self, act: Act, screen: float | None = None) -> Iterator[PackedFFN]:
        def packed(layer: list[Tensor]) -> PackedFFN:
            gate_FD, up_FD, down_FD = layer
            weights = FFNWeights(up_FD, down_FD, act, gate_FD)
            return pack(weights, dtype=self.packed, sole=True, screen=screen)

        return cycle([packed(layer) for layer in self._layers])

    def set_tokens(self, tokens: int) -> None:
        """Inputs of length sqrt(D)."""
        x_TD = functional.normalize(torch.randn(tokens, self.width), dim=-1) * self.width**0.5
        self.tokens, self.x_TD = tokens, x_TD.to(self.dtype)

    def dense(self) -> Iterator[Way]:
        """F.linear, the baseline; and, of one token, matrix times vector."""
        x_TD, shape = self.x_TD, (self.width, self.neurons)

        def by_linear() -> Tensor:
            gate_FD, up_FD, down_FD = next(self._turn)
            h_TF = functional.silu(linear(x_TD, gate_FD)) * linear(x_TD, up_FD)
            return linear(h_TF, down_FD.view(shape))

        def by_mv() -> Tensor:
            gate_FD, up_FD, down_FD = next(self._turn)
            h_F = functional.silu(torch.mv(gate_FD, x_TD[0])) * torch.mv(up_FD, x_TD[0])
            return torch.mv(down_FD.view(shape), h_F)

        yield Way("F.linear", self.dtype, 0.0, self.size, by_linear)
        if self.tokens == 1:
            yield Way("torch.mv", self.dtype, 0.0, self.size, by_mv)

    def sparse(self, sparsity: float, expert_size: int) -> Iterator[Way]:
        """The naive gather, and the native ways: experts given, neurons given, gate first."""
        of_bytes = BITS[self.packed] / 8 / self.dtype.itemsize  # of what the dense ways read
        on = 1 - sparsity**self.tokens  # by one token at least
        size, gates = int(self.size * of_bytes * on), int(self.size * of_bytes / 3)
        experts = Division.of_size(self.neurons, expert_size).num_experts

        def way(name: str, read: int, call: Callable[[], Tensor]) -> Way:
            return Way(name, self.packed, sparsity, read, call)

        if self.tokens == 1:
            dense_size = int(self.size * on)
            yield Way("torch gather", self.dtype, sparsity, dense_size, self._gather(sparsity))
        yield way(f"experts of {expert_size}", size, self._routed(sparsity, experts))
        yield way("neurons given", size, self._routed(sparsity, self.neurons))
        yield way("exact gate", gates + size * 2 // 3, self._exact(sparsity, self._fatrelu))
        if self._screened is not None:
            read = self.neurons * self.width + size
            yield way("screened gate", read, self._exact(sparsity, self._screened))

    def _gather(self, sparsity: float) -> Callable[[], Tensor]:
        masks = self._masks(sparsity, self.neurons)
        picked = cycle([mask_1F[0].nonzero()[:, 0] for mask_1F in masks])

        def call() -> Tensor:
            on, x_D = next(picked), self.x_TD[0]
            gate_ND, up_ND, down_ND = (rows_FD.index_select(0, on) for rows_FD in next(self._turn))
            h_N = functional.silu(torch.mv(gate_ND, x_D)) * torch.mv(up_ND, x_D)
            return torch.mv(down_ND.T, h_N)

        return call

    def _routed(self, sparsity: float, experts: int) -> Callable[[], Tensor]:
        picked = cycle(self._masks(sparsity, experts))
        return lambda: next(self._silu)(self.x_TD, next(picked))

    def _exact(self, sparsity: float, packed: Iterator[PackedFFN]) -> Callable[[], Tensor]:
        # A gate is normal, and as wide as x is long: this share of them stays below theta = 1.
        limit = max(float(torch.special.ndtri(torch.tensor(sparsity))), 1e-3)
        x_TD = self.x_TD / limit
        return lambda: next(packed)(x_TD)

    def _masks(self, sparsity: float, experts: int) -> list[Tensor]:
        """As many random choices as there are layers, or more."""
        on = max(1, round(experts * (1 - sparsity)))
        count = max(64 if self.tokens == 1 else 4, len(self._layers))
        scores = torch.rand(count, self.tokens, experts)
        chosen = scores.topk(on, dim=-1).indices
        return list(torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True))


def _interleaved(calls: list[Callable[[], Tensor]], repeats: int) -> list[list[float]]:
    """Seconds of every repeat of each call."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for repeat in range(repeats + WARM_UP):
            for call, own in zip(calls, times, strict=True):
                began = time.perf_counter()
                call()
                if repeat >= WARM_UP:
                    own.append(time.perf_counter() - began)
    return times


def _timing(
    way: Way, tokens: int, own: list[float], dense: list[float], bandwidth: float
) -> KernelTiming:
    seconds = statistics.median(own)
    speedup = statistics.median(d / o for d, o in zip(dense, own, strict=True))
    rate = way.size / seconds
    ms = seconds * 1e3
    return KernelTiming(
        way.operation,
        str(way.dtype).removeprefix("torch."),
        tokens,
        way.sparsity,
        ms,
        speedup,
        rate / 1e9,
        rate / bandwidth,
    )


def _read_bandwidth(size: int) -> float:
    """Bytes a second of the best of five sums over `size` bytes."""
    buffer = torch.ones(max(1, size // 4))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return size / min(seconds)
