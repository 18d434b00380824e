"""Time of one FFN, dense and routed, in one interleaved run. Letters: T tokens, D width, F neurons.

A converted model computes every neuron and masks: the figures say what routing costs on top.
`bench_kernels` times the kernels that leave neurons out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.experts.conversion import Conversion, attach_experts

SHAPES = {"smollm2-135m": (576, 1536), "llama2-7b": (4096, 11008), "d2048": (2048, 8192)}
"""Name -> (D, F) of a gated FFN."""


@dataclass(frozen=True)
class Timing:
    """One operation on one shape: medians over the repeats, dense and routed in turn."""

    operation: str
    tokens: int
    dense_ms: float
    routed_ms: float
    ratio: float
    """Median of routed / dense, pair by pair."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def widths(shape: str) -> tuple[int, int]:
    """(D, F) of a name, or of "DxF".

    Raises:
        ValueError: neither.
    """
    if shape in SHAPES:
        return SHAPES[shape]
    width, _, neurons = shape.partition("x")
    if not (width.isdecimal() and neurons.isdecimal() and int(width) and int(neurons)):
        raise ValueError(f"unknown shape {shape!r} (known: {', '.join(SHAPES)}, or DxF)")
    return int(width), int(neurons)


def bench_ffn(
    shape: str, *, expert_size: int = 8, dtype: torch.dtype = torch.float32, repeats: int = 15
) -> list[Timing]:
    """Forward at 1 and 512 tokens, and forward with backward at 512.

    Raises:
        ValueError: an unknown shape, or a size that exceeds its neurons.
    """
    width, neurons = widths(shape)
    dense, routed = _Host(width, neurons, dtype), _Host(width, neurons, dtype)
    spec = {"kind": "threshold", "tau": 0.5}
    attach_experts(routed, Conversion("bench", expert_size, "sigmoid", spec, "straight"))
    made = []
    for operation, tokens in (("forward", 1), ("forward", 512), ("forward + backward", 512)):
        x_TD = torch.randn(tokens, width, dtype=dtype)
        backward = operation != "forward"
        pair = [_call(model, x_TD, backward) for model in (dense, routed)]
        made.append(_timing(operation, tokens, pair[0], pair[1], repeats))
    return made


class _Host(nn.Module):
    """The least a conversion needs of a model: an FFN of a known class, and a config."""

    def __init__(self, width: int, neurons: int, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        self.config: Any = LlamaConfig(hidden_size=width, intermediate_size=neurons)
        self.mlp = LlamaMLP(self.config).to(dtype)


def _call(host: nn.Module, x_TD: Tensor, backward: bool) -> Callable[[], None]:
    def call() -> None:
        with torch.set_grad_enabled(backward):
            y_TD = host.get_submodule("mlp")(x_TD)
            if backward:
                y_TD.sum().backward()

    return call


def _timing(
    operation: str, tokens: int, dense: Callable[[], None], routed: Callable[[], None], repeats: int
) -> Timing:
    pairs = []
    for index in range(repeats + 2):
        pair = (_milliseconds(dense), _milliseconds(routed))
        if index >= 2:  # the first calls warm caches and allocators
            pairs.append(pair)
    dense_ms, routed_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(routed / dense for dense, routed in pairs)
    return Timing(operation, tokens, dense_ms, routed_ms, ratio)


def _milliseconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
