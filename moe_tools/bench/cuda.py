"""Time of one FFN on a GPU: the Triton kernels beside cuBLAS, and the memory's own speed.

Each way is captured in one CUDA graph a layer, so that what is timed is the device and not the
Python around it, and replayed between two events. Ways take turns, and each goes over so many
layers that it reads more than twice the L2 before it meets one again.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_tools.bench.ffn import widths
from moe_tools.experts.division import Division
from moe_tools.kernels.activations import Act
from moe_tools.kernels.reference import neuron_mask
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
BATCHES = (1, 4, 16)
WARM_UP = 3
"""Rounds before the first that counts."""
COPIED = 1 << 30
"""Bytes of the buffer that is copied to measure the memory."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Plan:
    """What is timed, from numbers alone."""

    width: int
    neurons: int
    experts: int
    dtype: torch.dtype
    l2: int
    """Bytes of the device's L2."""

    @property
    def size(self) -> int:
        """Bytes of one layer."""
        return 3 * self.width * self.neurons * self.dtype.itemsize

    @property
    def layers(self) -> int:
        """So many that the sparsest way reads more than twice the L2 in one turn over them."""
        least = self.size * (1 - max(SPARSITIES))
        return math.floor(2 * self.l2 / least) + 1

    @property
    def variants(self) -> list[tuple[int, float, str]]:
        """(tokens, sparsity, operation), the dense one first for each number of tokens."""
        sparse = list(product(SPARSITIES, ("experts", "experts int8", "neurons", "exact gate")))
        rows = [(0.0, "F.linear"), *sparse]
        return [(tokens, sparsity, operation) for tokens in BATCHES for sparsity, operation in rows]


@dataclass(frozen=True)
class Way:
    """One way to compute the FFN: a call for each layer."""

    operation: str
    tokens: int
    sparsity: float
    size: int
    """Bytes of weights that a call has to read, on average over the layers: of the neurons that
    any token wants, all gates of an exact gate."""
    calls: list[Call]


@dataclass(frozen=True)
class CudaTiming:
    """Medians over the repeats of one run."""

    operation: str
    tokens: int
    sparsity: float
    """Share of the neurons that are off for one token."""
    ms: float
    speedup: float
    """Over F.linear with as many tokens, repeat by repeat."""
    gigabytes_per_second: float
    """Of the weights that have to be read."""
    share_of_bandwidth: float
    """Of what copying a large buffer moves a second."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench_cuda(
    shape: str,
    *,
    expert_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 30,
) -> list[CudaTiming]:
    """Every variant of the `Plan` of this GPU.

    Raises:
        ValueError: no GPU, no Triton, an unknown shape, or experts larger than its neurons.
    """
    width, neurons = widths(shape)
    experts = Division.of_size(neurons, expert_size).num_experts
    if not torch.cuda.is_available():
        raise ValueError(
            "bench kernels --device cuda needs a GPU, and torch sees none: run it where one is, "
            "or with --device cpu"
        )
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    found = ways(Plan(width, neurons, experts, dtype, l2), "cuda")
    ms = _time_graphs([[_capture(call) for call in way.calls] for way in found], repeats)
    return timings(found, ms, _copy_bandwidth())


@torch.no_grad()
def ways(plan: Plan, device: str) -> list[Way]:
    """The variants of a plan, with layers of random weights and experts of their own choice."""
    layers = [_Layer(plan, device) for _ in range(plan.layers)]
    makers = {
        "F.linear": _dense,
        "experts": _routed,
        "experts int8": _routed,
        "neurons": _routed,
        "exact gate": _exact,
    }
    return [makers[name](plan, layers, tokens, off, name) for tokens, off, name in plan.variants]


def timings(found: list[Way], ms: list[list[float]], bandwidth: float) -> list[CudaTiming]:
    """One row a way; `ms` of every repeat of each, `bandwidth` in bytes a second."""
    dense = {
        way.tokens: own for way, own in zip(found, ms, strict=True) if way.operation == "F.linear"
    }

    def row(way: Way, own: list[float]) -> CudaTiming:
        median = statistics.median(own)
        speedup = statistics.median(d / o for d, o in zip(dense[way.tokens], own, strict=True))
        rate = way.size / median * 1e3
        key = (way.operation, way.tokens, way.sparsity)
        return CudaTiming(*key, median, speedup, rate / 1e9, rate / bandwidth)

    return [row(way, own) for way, own in zip(found, ms, strict=True)]


class _Layer:
    """Random weights, and what `pack` makes of them."""

    def __init__(self, plan: Plan, device: str) -> None:
        shape = (plan.neurons, plan.width)
        gate_FD, up_FD, down_FD = (
            (torch.randn(shape, device=device) / plan.width**0.5).to(plan.dtype) for _ in range(3)
        )
        self.gate_FD, self.up_FD, self.down_FD = gate_FD, up_FD, down_FD
        # The same numbers as cuBLAS reads them: what they are does not matter to time.
        self.down_DF = down_FD.view(plan.width, plan.neurons)
        silu = FFNWeights(up_FD, down_FD, Act("silu"), gate_FD)
        fatrelu = FFNWeights(up_FD, down_FD, Act("fatrelu", 1.0), gate_FD)
        self.silu, self.int8 = (
            pack(silu, dtype=dtype, backend="triton") for dtype in (plan.dtype, torch.int8)
        )
        self.fatrelu = pack(fatrelu, backend="triton")


def _input(plan: Plan, layers: list[_Layer], tokens: int) -> Tensor:
    x_TD = torch.randn(tokens, plan.width, device=layers[0].up_FD.device)
    return (functional.normalize(x_TD, dim=1) * plan.width**0.5).to(plan.dtype)


def _dense(plan: Plan, layers: list[_Layer], tokens: int, off: float, name: str) -> Way:
    x_TD = _input(plan, layers, tokens)

    def call(layer: _Layer) -> Call:
        def run() -> Tensor:
            gate_TF = functional.silu(functional.linear(x_TD, layer.gate_FD))
            h_TF = gate_TF * functional.linear(x_TD, layer.up_FD)
            return functional.linear(h_TF, layer.down_DF)

        return run

    return Way(name, tokens, off, plan.size, [call(layer) for layer in layers])


def _routed(plan: Plan, layers: list[_Layer], tokens: int, off: float, name: str) -> Way:
    """Experts, or single neurons, chosen at random for each token and layer."""
    x_TD = _input(plan, layers, tokens)
    experts = plan.neurons if name == "neurons" else plan.experts
    masks = [_mask(tokens, experts, off).to(x_TD.device) for _ in layers]
    packed = [layer.int8 if name == "experts int8" else layer.silu for layer in layers]
    on = sum(float(neuron_mask(mask.any(0)[None], plan.neurons).float().mean()) for mask in masks)
    bytes_each = 1 if name == "experts int8" else plan.dtype.itemsize
    size = int(plan.size * on / len(layers) * bytes_each / plan.dtype.itemsize)

    def call(index: int) -> Call:
        return lambda: packed[index](x_TD, masks[index])

    return Way(name, tokens, off, size, [call(index) for index in range(len(layers))])


def _exact(plan: Plan, layers: list[_Layer], tokens: int, off: float, name: str) -> Way:
    # A gate is normal, and as wide as x is long: this share of them stays below theta = 1.
    limit = max(float(torch.special.ndtri(torch.tensor(off))), 1e-3)
    x_TD = _input(plan, layers, tokens) / limit
    fires = [(functional.linear(x_TD, layer.gate_FD) >= 1.0).any(0) for layer in layers]
    on = sum(float(fires_F.float().mean()) for fires_F in fires) / len(layers)
    size = int(plan.size * (1 + 2 * on) / 3)

    def call(layer: _Layer) -> Call:
        return lambda: layer.fatrelu(x_TD)

    return Way(name, tokens, off, size, [call(layer) for layer in layers])


def _mask(tokens: int, experts: int, off: float) -> Tensor:
    on = max(1, round(experts * (1 - off)))
    chosen_TK = torch.rand(tokens, experts).topk(on).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen_TK, True)


def _capture(call: Call) -> Any:
    """The call as a CUDA graph; it ran before, so that nothing is compiled while capturing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return graph


def _time_graphs(graphs: list[list[Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of every repeat of each way, all ways in turn, the next layer each time."""
    marks: list[list[tuple[Any, Any]]] = [[] for _ in graphs]
    for repeat in range(WARM_UP + repeats):
        for own, layers in zip(marks, graphs, strict=True):
            own.append(_time_replay(layers[repeat % len(layers)]))
    torch.cuda.synchronize()
    return [[start.elapsed_time(stop) for start, stop in own[WARM_UP:]] for own in marks]


def _time_replay(graph: Any) -> tuple[Any, Any]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    return start, stop


def _copy_bandwidth() -> float:
    """Bytes a second, read and written, of the best of ten copies of a large buffer."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    return 2 * COPIED / min(seconds)
