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
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moe_tools.kernels.activations import Act
from moe_tools.kernels.sparse_ffn import backends as backends  # what `doctor` shows
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights
from moe_tools.measure.bench import widths

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
ROTATED = 1_600_000_000
"""Bytes of weights that calls go over in turn: more than any cache holds."""
WARM_UP = 2
"""Calls before the first that counts: they warm allocators and page tables."""

Call = Callable[[], int]
"""One FFN; the bytes of weights that it had to read."""


@dataclass(frozen=True)
class KernelTiming:
    """One way to compute a gated FFN for one token: medians over the repeats, all ways in turn."""

    operation: str
    sparsity: float
    """Share of the neurons that are off; 0: dense."""
    ms: float
    speedup: float
    """Median of the time of F.linear over this one's, repeat by repeat."""
    gigabytes_per_second: float
    """Of weights that had to be read: rows of neurons that are on, every gate of an exact gate."""
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
    calls: dict[tuple[str, float], Call] = {
        ("F.linear", 0.0): layers.linear,
        ("torch.mv", 0.0): layers.mv,
    }
    for sparsity in SPARSITIES:
        calls |= {(name, sparsity): call for name, call in layers.sparse(sparsity, expert_size)}
    bandwidth = _read_bandwidth(rotated)
    times, sizes = _interleaved(calls, repeats)
    return [_timing(key, times, sizes[key], bandwidth) for key in calls]


class _Layers:
    """As many FFNs as the rotation needs: as torch has them, and packed for each activation."""

    def __init__(self, width: int, neurons: int, dtype: torch.dtype, rotated: int) -> None:
        self.width, self.neurons = width, neurons
        self.bytes = 3 * neurons * width * dtype.itemsize
        count = max(1, math.ceil(rotated / self.bytes))
        self.x_D = nn.functional.normalize(torch.randn(width), dim=0).mul(width**0.5).to(dtype)
        self._dense = [
            [(torch.randn(neurons, width) / width**0.5).to(dtype) for _ in range(3)]
            for _ in range(count)
        ]
        self._turn = cycle(self._dense)
        self._silu, self._fatrelu = (
            [pack(FFNWeights(up, down, act, gate), backend="cpu") for gate, up, down in self._dense]
            for act in (Act("silu"), Act("fatrelu", 1.0))
        )

    def linear(self) -> int:
        gate_FD, up_FD, down_FD = next(self._turn)
        x_1D = self.x_D[None]
        linear(silu(linear(x_1D, gate_FD)) * linear(x_1D, up_FD), down_FD.view(self._down))
        return self.bytes

    def mv(self) -> int:
        gate_FD, up_FD, down_FD = next(self._turn)
        h_F = silu(torch.mv(gate_FD, self.x_D)) * torch.mv(up_FD, self.x_D)
        torch.mv(down_FD.view(self._down), h_F)
        return self.bytes

    def sparse(self, sparsity: float, expert_size: int) -> Iterator[tuple[str, Call]]:
        """The naive gather, and the native ways: experts given, neurons given, gate first."""
        experts = max(1, self.neurons // expert_size)
        yield "torch gather", self._gather(sparsity)
        yield f"experts of {expert_size}", self._routed(sparsity, experts)
        yield "neurons given", self._routed(sparsity, self.neurons)
        yield "exact gate", self._exact(sparsity)

    def _gather(self, sparsity: float) -> Call:
        picked = self._choices(sparsity, self.neurons)

        def call() -> int:
            layer, on = next(self._turn), next(picked).nonzero()[:, 0]
            gate_ND, up_ND, down_ND = (matrix_FD.index_select(0, on) for matrix_FD in layer)
            torch.mv(down_ND.T, silu(torch.mv(gate_ND, self.x_D)) * torch.mv(up_ND, self.x_D))
            return self.bytes * len(on) // self.neurons

        return call

    def _routed(self, sparsity: float, experts: int) -> Call:
        picked, turn = self._choices(sparsity, experts), cycle(self._silu)

        def call() -> int:
            mask_E = next(picked)
            next(turn)(self.x_D, mask_E)
            return int(self.bytes * mask_E.float().mean())

        return call

    def _exact(self, sparsity: float) -> Call:
        # A gate is normal, and as wide as x is long: this share of them stays below theta = 1.
        limit = max(float(torch.special.ndtri(torch.tensor(sparsity))), 1e-3)
        x_D = self.x_D / limit
        turn = cycle(self._fatrelu)

        def call() -> int:
            next(turn)(x_D)
            return int(self.bytes * (1 + 2 * (1 - sparsity)) / 3)

        return call

    def _choices(self, sparsity: float, experts: int) -> Iterator[Tensor]:
        on = max(1, round(experts * (1 - sparsity)))
        masks_E = []
        for _ in range(max(64, len(self._dense))):
            mask_E = torch.zeros(experts, dtype=torch.bool)
            mask_E[torch.randperm(experts)[:on]] = True
            masks_E.append(mask_E)
        return cycle(masks_E)

    @property
    def _down(self) -> tuple[int, int]:
        return self.width, self.neurons


def _interleaved(
    calls: dict[tuple[str, float], Call], repeats: int
) -> tuple[dict[tuple[str, float], list[float]], dict[tuple[str, float], int]]:
    """Seconds of every call in every repeat, and the bytes each had to read."""
    times: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    sizes = {}
    with torch.no_grad():
        for repeat in range(repeats + WARM_UP):
            for key, call in calls.items():
                began = time.perf_counter()
                sizes[key] = call()
                if repeat >= WARM_UP:
                    times[key].append(time.perf_counter() - began)
    return times, sizes


def _timing(
    key: tuple[str, float],
    times: dict[tuple[str, float], list[float]],
    size: int,
    bandwidth: float,
) -> KernelTiming:
    seconds = statistics.median(times[key])
    pairs = zip(times["F.linear", 0.0], times[key], strict=True)
    speedup = statistics.median(dense / ours for dense, ours in pairs)
    rate = size / seconds
    return KernelTiming(*key, seconds * 1e3, speedup, rate / 1e9, rate / bandwidth)


def _read_bandwidth(size: int) -> float:
    """Bytes a second of the best of five sums over `size` bytes."""
    buffer = torch.ones(size // 4)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return size / min(seconds)
