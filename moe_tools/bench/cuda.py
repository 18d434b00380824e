"""Time of one FFN on a GPU: the Triton kernels beside cuBLAS, and the memory's own speed.

Each way is captured in one CUDA graph, so that what is timed is the device and not the Python
around it, and replayed between two events. Ways take turns, and each goes over so many layers that
it reads more than twice the L2 before it meets one again.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.bench.ffn import widths
from moe_tools.bench.kernels import BITS
from moe_tools.bench.rounds import in_turn
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
from moe_tools.inference.optimized import PACKED
from moe_tools.kernels.activations import Act
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.reference import neuron_mask
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

BATCHES = (1, 4, 16, 64, 512)
OPERATIONS = ("experts", "experts int8", "experts int4", "neurons", "exact gate")
"""Sparse ways; a word of `PACKED` behind "experts" says what their weights are stored as."""
WARM_UP = 3
"""Rounds before the first that counts."""
LEAST_CALLS = 8
"""Calls in a graph, at least: what lies between two graphs is little beside so many."""
COPIED = 1 << 30
"""Bytes of the buffer that is copied to measure the memory."""

Event = Any  # torch.cuda.Event, which a torch without CUDA cannot make


@dataclass(frozen=True)
class Plan:
    """What is timed; it follows from numbers, without a GPU."""

    width: int
    neurons: int
    experts: int
    dtype: torch.dtype
    l2: int
    """Bytes of the device's L2."""
    batches: tuple[int, ...] = BATCHES

    @property
    def size(self) -> int:
        """Bytes of one layer."""
        return ffn_size(self.width, self.neurons, self.dtype)

    @property
    def variants(self) -> list[tuple[int, float, str]]:
        """(tokens, sparsity, operation), the dense one first for each number of tokens."""
        rows = [(0.0, BASELINE), *product(SPARSITIES, OPERATIONS)]
        return [(tokens, off, operation) for tokens in self.batches for off, operation in rows]

    def stored(self, operation: str) -> torch.dtype:
        """What the weights of an operation are stored as."""
        return PACKED.get(operation.removeprefix("experts "), self.dtype)

    def expected(self, tokens: int, off: float, operation: str) -> float:
        """Bytes of weights that a call is likely to read: those of the union of its tokens."""
        on = 1 - off**tokens if off else 1.0
        if operation == "exact gate":
            on = (1 + 2 * on) / 3
        return self.size * on * BITS[self.stored(operation)] / BITS[self.dtype]

    def layers(self, tokens: int, off: float, operation: str) -> int:
        """Number of layers: in one turn over them a way reads more than twice the L2."""
        return math.floor(2 * self.l2 / self.expected(tokens, off, operation)) + 1

    @property
    def memory(self) -> int:
        """Bytes that all layers of all ways take, about: each kind is kept once."""
        kinds: dict[tuple[bool, torch.dtype], float] = {}
        for variant in self.variants:
            stored = self.stored(variant[-1])
            kind = (variant[-1] in (BASELINE, "exact gate"), stored)
            size = self.layers(*variant) * self.size * BITS[stored] / BITS[self.dtype]
            kinds[kind] = max(kinds.get(kind, 0.0), size)
        return int(2 * sum(kinds.values()))


def bench_cuda(
    shape: str,
    *,
    expert_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 30,
    batches: Sequence[int] = BATCHES,
    bandwidth: float | None = None,
) -> list[KernelTiming]:
    """Times every variant of the `Plan` for this GPU.

    Args:
        shape: a name of `SHAPES`, or DxF.
        expert_size: neurons.
        dtype: of x, and of weights that are not stored in fewer bits.
        repeats: rounds that count.
        batches: numbers of tokens.
        bandwidth: bytes a second that the memory copies; measured where it is not given.

    Raises:
        ValueError: no GPU, no Triton, an unknown shape, or experts larger than its neurons.
    """
    plan = plan_for(shape, expert_size=expert_size, dtype=dtype, batches=batches)
    bandwidth = copy_bandwidth() if bandwidth is None else bandwidth
    made = ways(plan, "cuda")
    return timings(made, graph_seconds([way.calls for way in made], repeats), bandwidth)


def plan_for(
    shape: str,
    *,
    expert_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    batches: Sequence[int] = BATCHES,
) -> Plan:
    """The plan of a shape for the GPU at hand.

    Raises:
        ValueError: no GPU, an unknown shape, or experts larger than its neurons.
    """
    width, neurons = widths(shape)
    experts = Division.of_size(neurons, expert_size).num_experts
    if not torch.cuda.is_available():
        raise ValueError(
            "bench kernels --device cuda needs a GPU, and torch sees none: run it where one is, "
            "or with --device cpu"
        )
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return Plan(width, neurons, experts, dtype, l2, tuple(batches))


@torch.no_grad()
def ways(plan: Plan, device: str) -> list[Way]:
    """Builds the variants of a plan; each layer has random weights and its own random experts."""
    layers = Layers(plan, device)
    makers = {BASELINE: _dense, "exact gate": _exact}
    return [
        makers.get(name, _routed)(plan, layers, tokens, off, name)
        for tokens, off, name in plan.variants
    ]


class Layers:
    """FFNs of random weights, each kind made once and as many as the way needs that has most."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan, self.device = plan, device
        self._dense: list[tuple[Tensor, Tensor, Tensor]] = []
        self._packed: dict[tuple[torch.dtype, Act], list[PackedFFN]] = {}

    def dense(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns (gate_FD, up_FD, down_FD) of that many layers."""
        while len(self._dense) < count:
            self._dense.append(self._random())
        return self._dense[:count]

    def packed(self, count: int, dtype: torch.dtype, act: Act) -> list[PackedFFN]:
        """Returns what `pack` makes of that many layers."""
        made = self._packed.setdefault((dtype, act), [])
        while len(made) < count:
            gate_FD, up_FD, down_FD = self._random()
            weights = FFNWeights(up_FD, down_FD, act, gate_FD)
            made.append(pack(weights, dtype=dtype, backend="triton"))
        return made[:count]

    def _random(self) -> tuple[Tensor, Tensor, Tensor]:
        return random_ffn(self.plan.width, self.plan.neurons, self.plan.dtype, self.device)


def _input(plan: Plan, layers: Layers, tokens: int) -> Tensor:
    return random_input(tokens, plan.width, plan.dtype, layers.device)


def _dense(plan: Plan, layers: Layers, tokens: int, off: float, name: str) -> Way:
    x_TD = _input(plan, layers, tokens)
    weights = layers.dense(plan.layers(tokens, off, name))
    calls: list[Call] = [partial(dense_ffn, x_TD, *own) for own in weights]
    return Way(name, plan.dtype, tokens, off, plan.size, calls)


def _routed(plan: Plan, layers: Layers, tokens: int, off: float, name: str) -> Way:
    """Chooses experts, or single neurons, at random for each token and layer."""
    x_TD, count, dtype = (
        _input(plan, layers, tokens),
        plan.layers(tokens, off, name),
        plan.stored(name),
    )
    experts = plan.neurons if name == "neurons" else plan.experts
    masks = [mask.to(x_TD.device) for mask in random_masks(count, tokens, experts, off)]
    shares = [float(neuron_mask(mask.any(0)[None], plan.neurons).float().mean()) for mask in masks]
    size = int(plan.size * statistics.mean(shares) * BITS[dtype] / BITS[plan.dtype])
    packed = layers.packed(count, dtype, SILU)
    calls: list[Call] = [
        partial(ffn, x_TD, mask_TE) for ffn, mask_TE in zip(packed, masks, strict=True)
    ]
    return Way(name, dtype, tokens, off, size, calls)


def _exact(plan: Plan, layers: Layers, tokens: int, off: float, name: str) -> Way:
    x_TD = with_gates_off(_input(plan, layers, tokens), off)
    packed = layers.packed(plan.layers(tokens, off, name), plan.dtype, FATRELU)
    fires = [linear(x_TD, ffn.weights.routing_FD) >= FATRELU.threshold for ffn in packed]
    on = statistics.mean(float(fires_TF.any(0).float().mean()) for fires_TF in fires)
    size = int(plan.size * (1 + 2 * on) / 3)
    calls: list[Call] = [partial(ffn, x_TD) for ffn in packed]
    return Way(name, plan.dtype, tokens, off, size, calls)


def graph_seconds(turns: Sequence[Sequence[Call]], repeats: int) -> list[list[float]]:
    """Returns the seconds of a call in every round of each way; ways take turns, each a graph.

    Args:
        turns: of each way its calls, one for each layer; all are captured in one graph, again and
            again until they are `LEAST_CALLS`.
        repeats: rounds that count.
    """
    filled = [list(islice(cycle(calls), max(len(calls), LEAST_CALLS))) for calls in turns]
    graphs = [capture(calls) for calls in filled]
    marks = in_turn([_replay(graph) for graph in graphs], repeats, warm_up=WARM_UP)
    torch.cuda.synchronize()
    return [
        [start.elapsed_time(stop) / 1e3 / len(calls) for start, stop in own]
        for own, calls in zip(marks, filled, strict=True)
    ]


def capture(calls: Sequence[Callable[[], Any]]) -> Any:
    """Makes a CUDA graph of calls; each runs once before: nothing compiles while capturing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: Any) -> Callable[[], tuple[Event, Event]]:
    return lambda: between_events(graph.replay)


def between_events(call: Callable[[], Any]) -> tuple[Event, Event]:
    """Puts a call into the stream between two events, and waits for neither."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    return start, stop


def copy_bandwidth() -> float:
    """Measures how many bytes a second a copy reads and writes, at best of ten."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = []
    for _ in range(10):
        start, stop = between_events(partial(target.copy_, source))
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return 2 * COPIED / min(milliseconds) * 1e3
