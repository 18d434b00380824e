"""Time of one FFN, dense and routed, in one interleaved run. Letters: T tokens, D width, F neurons.

A converted model computes every neuron and masks: the figures say what routing costs on top.
`moe_tools.bench.kernels` times the kernels that leave neurons out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.bench.rounds import in_turn, median_ratio, seconds
from moe_tools.experts.conversion import Conversion, attach_experts

SHAPES = {
    "smollm2-135m": (576, 1536),
    "llama2-7b": (4096, 11008),
    "mixtral-8x7b": (4096, 14336),
    "d2048": (2048, 8192),
}
"""Name -> (D, F) of a gated FFN; of a mixture, of one of its experts."""
WARM_UP = 2
"""Rounds before the first that counts: they warm caches and allocators."""


@dataclass(frozen=True)
class Timing:
    """One operation on one shape: medians over the repeats, dense and routed in turn."""

    operation: str
    tokens: int
    dense_ms: float
    routed_ms: float
    ratio: float
    """Median of routed / dense, pair by pair."""


def widths(shape: str) -> tuple[int, int]:
    """Returns (D, F) for a name, or for "DxF".

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
    """Times the forward pass at 1 and 512 tokens, and forward with backward at 512.

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
        made.append(_timing(operation, tokens, pair, repeats))
    return made


class _Host(nn.Module):
    """The smallest model that can be converted: an FFN of a known class, and a config."""

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


def _timing(operation: str, tokens: int, pair: list[Callable[[], None]], repeats: int) -> Timing:
    dense, routed = in_turn([partial(seconds, call) for call in pair], repeats, warm_up=WARM_UP)
    dense_ms, routed_ms = (1e3 * statistics.median(own) for own in (dense, routed))
    return Timing(operation, tokens, dense_ms, routed_ms, median_ratio(routed, dense))
