"""Time of one FFN at one token, dense and sparse, in one interleaved run, beside the byte limit.

Decoding reads weights: the limit is the bytes that must be read over the memory's bandwidth. Hence
no weights are met again in a cache: calls go in turn over layers of more than 1.5 GB, each with
experts of its own choice.

Letters: D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from moe_tools.kernels.activations import Act
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.sparse_ffn import backends as backends  # `doctor` shows them
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights
from moe_tools.measure.bench import widths
from moe_tools.model.division import Division

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
ROTATED = 1_600_000_000
"""Bytes of weights that calls go over in turn: more than any cache holds."""
WARM_UP = 2
"""Calls before the first that counts: they warm allocators and page tables."""


@dataclass(frozen=True)
class Way:
    """One way to compute the FFN of one token."""

    operation: str
    sparsity: float
    """Share of the neurons that are off; 0: dense."""
    size: int
    """Bytes that it has to read: rows of neurons that are on, all gates of an exact gate."""
    call: Callable[[], Tensor]


@dataclass(frozen=True)
class KernelTiming:
    """One way to compute a gated FFN for one token: medians over the repeats, all ways in turn."""

    operation: str
    sparsity: float
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
    repeats: int = 30,
    rotated: int = ROTATED,
) -> list[KernelTiming]:
    """The dense ways once, the sparse ways at each of `SPARSITIES`.

    Raises:
        ValueError: an unknown shape, or experts larger than its neurons.
    """
    layers = _Layers(*widths(shape), dtype, rotated)
    ways = list(layers.dense())
    for sparsity in SPARSITIES:
        ways += layers.sparse(sparsity, expert_size)
    seconds = _interleaved([way.call for way in ways], repeats)
    bandwidth = _read_bandwidth(rotated)
    return [
        _timing(way, own, seconds[0], bandwidth) for way, own in zip(ways, seconds, strict=True)
    ]


class _Layers:
    """As many FFNs as the rotation needs: as torch has them, and packed with two activations."""

    def __init__(self, width: int, neurons: int, dtype: torch.dtype, rotated: int) -> None:
        self.width, self.neurons = width, neurons
        self.size = 3 * neurons * width * dtype.itemsize
        self.x_D = (functional.normalize(torch.randn(width), dim=0) * width**0.5).to(dtype)
        self._layers = [
            [(torch.randn(neurons, width) / width**0.5).to(dtype) for _ in range(3)]
            for _ in range(max(1, math.ceil(rotated / self.size)))
        ]
        self._turn = cycle(self._layers)
        self._silu, self._fatrelu = (
            cycle([_pack(layer, act) for layer in self._layers])
            for act in (Act("silu"), Act("fatrelu", 1.0))
        )

    def dense(self) -> Iterator[Way]:
        """F.linear, the baseline; and matrix times vector."""
        x_1D, shape = self.x_D[None], (self.width, self.neurons)

        def by_linear() -> Tensor:
            gate_FD, up_FD, down_FD = next(self._turn)
            h_1F = functional.silu(linear(x_1D, gate_FD)) * linear(x_1D, up_FD)
            return linear(h_1F, down_FD.view(shape))

        def by_mv() -> Tensor:
            gate_FD, up_FD, down_FD = next(self._turn)
            h_F = functional.silu(torch.mv(gate_FD, self.x_D)) * torch.mv(up_FD, self.x_D)
            return torch.mv(down_FD.view(shape), h_F)

        yield Way("F.linear", 0.0, self.size, by_linear)
        yield Way("torch.mv", 0.0, self.size, by_mv)

    def sparse(self, sparsity: float, expert_size: int) -> Iterator[Way]:
        """The naive gather, and the native ways: experts given, neurons given, gate first."""
        size = int(self.size * (1 - sparsity))
        experts = Division.of_size(self.neurons, expert_size).num_experts
        yield Way("torch gather", sparsity, size, self._gather(sparsity))
        yield Way(f"experts of {expert_size}", sparsity, size, self._routed(sparsity, experts))
        yield Way("neurons given", sparsity, size, self._routed(sparsity, self.neurons))
        yield Way("exact gate", sparsity, self.size // 3 + size * 2 // 3, self._exact(sparsity))

    def _gather(self, sparsity: float) -> Callable[[], Tensor]:
        picked = cycle([mask_F.nonzero()[:, 0] for mask_F in self._masks(sparsity, self.neurons)])

        def call() -> Tensor:
            on = next(picked)
            gate_ND, up_ND, down_ND = (rows_FD.index_select(0, on) for rows_FD in next(self._turn))
            h_N = functional.silu(torch.mv(gate_ND, self.x_D)) * torch.mv(up_ND, self.x_D)
            return torch.mv(down_ND.T, h_N)

        return call

    def _routed(self, sparsity: float, experts: int) -> Callable[[], Tensor]:
        picked = cycle(self._masks(sparsity, experts))
        return lambda: next(self._silu)(self.x_D, next(picked))

    def _exact(self, sparsity: float) -> Callable[[], Tensor]:
        # A gate is normal, and as wide as x is long: this share of them stays below theta = 1.
        limit = max(float(torch.special.ndtri(torch.tensor(sparsity))), 1e-3)
        x_D = self.x_D / limit
        return lambda: next(self._fatrelu)(x_D)

    def _masks(self, sparsity: float, experts: int) -> list[Tensor]:
        """As many random choices as there are layers, or more."""
        on = max(1, round(experts * (1 - sparsity)))
        orders = [torch.randperm(experts) for _ in range(max(64, len(self._layers)))]
        return [torch.zeros(experts, dtype=torch.bool).index_fill(0, o[:on], True) for o in orders]


def _pack(layer: list[Tensor], act: Act) -> PackedFFN:
    gate_FD, up_FD, down_FD = layer
    return pack(FFNWeights(up_FD, down_FD, act, gate_FD), backend="cpu")


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


def _timing(way: Way, own: list[float], dense: list[float], bandwidth: float) -> KernelTiming:
    seconds = statistics.median(own)
    speedup = statistics.median(d / o for d, o in zip(dense, own, strict=True))
    rate = way.size / seconds
    ms = seconds * 1e3
    return KernelTiming(way.operation, way.sparsity, ms, speedup, rate / 1e9, rate / bandwidth)


def _read_bandwidth(size: int) -> float:
    """Bytes a second of the best of five sums over `size` bytes."""
    buffer = torch.ones(max(1, size // 4))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return size / min(seconds)
