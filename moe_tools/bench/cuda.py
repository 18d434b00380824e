"""Time of one FFN on a GPU: the Triton kernels beside cuBLAS, and the memory's own speed.

Each way is captured in one CUDA graph a layer, so that what is timed is the device and not the
Python around it, and replayed between two events. Ways take turns, and each goes over so many
layers that it reads more than twice the L2 before it meets one again.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.bench.ffn import widths
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
from moe_tools.kernels.reference import neuron_mask
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

BATCHES = (1, 4, 16)
WARM_UP = 3
"""Rounds before the first that counts."""
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

    @property
    def size(self) -> int:
        """Bytes of one layer."""
        return ffn_size(self.width, self.neurons, self.dtype)

    @property
    def layers(self) -> int:
        """Number of layers: in one turn over them the sparsest way reads more than twice the L2."""
        least = self.size * (1 - max(SPARSITIES))
        return math.floor(2 * self.l2 / least) + 1

    @property
    def variants(self) -> list[tuple[int, float, str]]:
        """(tokens, sparsity, operation), the dense one first for each number of tokens."""
        sparse = list(product(SPARSITIES, ("experts", "experts int8", "neurons", "exact gate")))
        rows = [(0.0, BASELINE), *sparse]
        return [(tokens, sparsity, operation) for tokens in BATCHES for sparsity, operation in rows]


def bench_cuda(
    shape: str,
    *,
    expert_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 30,
) -> list[KernelTiming]:
    """Times every variant of the `Plan` for this GPU.

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
    return timings(found, _time(found, repeats), _copy_bandwidth())


@torch.no_grad()
def ways(plan: Plan, device: str) -> list[Way]:
    """Builds the variants of a plan; each layer has random weights and its own random experts."""
    layers = [_Layer(plan, device) for _ in range(plan.layers)]
    makers = {
        BASELINE: _dense,
        "experts": _routed,
        "experts int8": _routed,
        "neurons": _routed,
        "exact gate": _exact,
    }
    return [makers[name](plan, layers, tokens, off, name) for tokens, off, name in plan.variants]


class _Layer:
    """Random weights, and what `pack` makes of them."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.weights = random_ffn(plan.width, plan.neurons, plan.dtype, device)
        self.gate_FD, up_FD, down_FD = self.weights
        self.device = device
        silu = FFNWeights(up_FD, down_FD, SILU, self.gate_FD)
        fatrelu = FFNWeights(up_FD, down_FD, FATRELU, self.gate_FD)
        self.silu, self.int8 = (
            pack(silu, dtype=dtype, backend="triton") for dtype in (plan.dtype, torch.int8)
        )
        self.fatrelu = pack(fatrelu, backend="triton")


def _input(plan: Plan, layers: list[_Layer], tokens: int) -> Tensor:
    return random_input(tokens, plan.width, plan.dtype, layers[0].device)


def _dense(plan: Plan, layers: list[_Layer], tokens: int, off: float, name: str) -> Way:
    x_TD = _input(plan, layers, tokens)
    calls: list[Call] = [partial(dense_ffn, x_TD, *layer.weights) for layer in layers]
    return Way(name, plan.dtype, tokens, off, plan.size, calls)


def _routed(plan: Plan, layers: list[_Layer], tokens: int, off: float, name: str) -> Way:
    """Chooses experts, or single neurons, at random for each token and layer."""
    x_TD = _input(plan, layers, tokens)
    experts = plan.neurons if name == "neurons" else plan.experts
    masks = [mask.to(x_TD.device) for mask in random_masks(len(layers), tokens, experts, off)]
    on = sum(float(neuron_mask(mask.any(0)[None], plan.neurons).float().mean()) for mask in masks)
    dtype = torch.int8 if name == "experts int8" else plan.dtype
    size = int(ffn_size(plan.width, plan.neurons, dtype) * on / len(layers))
    packed = [layer.int8 if dtype == torch.int8 else layer.silu for layer in layers]
    calls: list[Call] = [
        partial(ffn, x_TD, mask_TE) for ffn, mask_TE in zip(packed, masks, strict=True)
    ]
    return Way(name, dtype, tokens, off, size, calls)


def _exact(plan: Plan, layers: list[_Layer], tokens: int, off: float, name: str) -> Way:
    x_TD = with_gates_off(_input(plan, layers, tokens), off)
    fires = [(linear(x_TD, layer.gate_FD) >= FATRELU.threshold).any(0) for layer in layers]
    on = sum(float(fires_F.float().mean()) for fires_F in fires) / len(layers)
    size = int(plan.size * (1 + 2 * on) / 3)
    calls: list[Call] = [partial(layer.fatrelu, x_TD) for layer in layers]
    return Way(name, plan.dtype, tokens, off, size, calls)


def _time(found: list[Way], repeats: int) -> list[list[float]]:
    """Returns the seconds of every round of each way; every round takes the next layer."""
    graphs = [cycle([_capture(call) for call in way.calls]) for way in found]
    marks = in_turn([_replay(turn) for turn in graphs], repeats, warm_up=WARM_UP)
    torch.cuda.synchronize()
    return [[start.elapsed_time(stop) / 1e3 for start, stop in own] for own in marks]


def _capture(call: Call) -> Any:
    """Makes a CUDA graph of a call, which runs once before: nothing compiles while capturing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return graph


def _replay(graphs: Iterator[Any]) -> Callable[[], tuple[Event, Event]]:
    return lambda: _between_events(next(graphs).replay)


def _between_events(call: Callable[[], Any]) -> tuple[Event, Event]:
    """Puts a call into the stream between two events, and waits for neither."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    return start, stop


def _copy_bandwidth() -> float:
    """Measures how many bytes a second a copy reads and writes, at best of ten."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = []
    for _ in range(10):
        start, stop = _between_events(partial(target.copy_, source))
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return 2 * COPIED / min(milliseconds) * 1e3
