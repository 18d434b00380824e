"""What the benchmarks of kernels share on every device: random FFNs, ways to compute one, rows.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from moe_tools.bench.rounds import median_ratio
from moe_tools.kernels.activations import Act

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
BASELINE = "F.linear"
"""Name of the dense operation that all others are compared with."""
SILU, FATRELU = Act("silu"), Act("fatrelu", 1.0)
"""The activations: SILU where experts or neurons are given, FATRELU where the gate decides."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """One way to compute a gated FFN."""

    operation: str
    dtype: torch.dtype
    """Type of the weights that it reads."""
    tokens: int
    sparsity: float
    """Share of the neurons that are off for one token; 0: dense."""
    size: int
    """Bytes of weights that a call has to read: rows of neurons that any token wants, all gates
    where the gate decides."""
    calls: list[Call]
    """Made in turn: one that goes over the layers itself, or one for each layer."""


@dataclass(frozen=True)
class KernelTiming:
    """How fast one way was: medians over the rounds, in which all ways take turns."""

    operation: str
    dtype: str
    """Type of the weights that it reads."""
    tokens: int
    sparsity: float
    """Share of the neurons that are off, another random choice for each token; 0: dense."""
    ms: float
    speedup: float
    """Time of F.linear with as many tokens over this one's, round by round."""
    gigabytes_per_second: float
    """Weights that have to be read, over the time."""
    share_of_bandwidth: float
    """That rate over the memory's: of summing up a large tensor, or on a GPU of copying one."""


def timings(
    ways: Sequence[Way], seconds: Sequence[Sequence[float]], bandwidth: float
) -> list[KernelTiming]:
    """Makes one row for each way.

    Args:
        ways: with a dense one (`BASELINE`) for each number of tokens.
        seconds: of every round of each way.
        bandwidth: bytes a second.
    """
    pairs = list(zip(ways, seconds, strict=True))
    dense = {way.tokens: own for way, own in pairs if way.operation == BASELINE}
    rows = []
    for way, own in pairs:
        median = statistics.median(own)
        rate = way.size / median
        row = KernelTiming(
            operation=way.operation,
            dtype=str(way.dtype).removeprefix("torch."),
            tokens=way.tokens,
            sparsity=way.sparsity,
            ms=median * 1e3,
            speedup=median_ratio(dense[way.tokens], own),
            gigabytes_per_second=rate / 1e9,
            share_of_bandwidth=rate / bandwidth,
        )
        rows.append(row)
    return rows


def ffn_size(width: int, neurons: int, dtype: torch.dtype) -> int:
    """Counts the bytes of the weights of a gated FFN."""
    return 3 * width * neurons * dtype.itemsize


def random_ffn(
    width: int, neurons: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws (gate_FD, up_FD, down_FD), whose rows have a length of about 1."""
    gate_FD, up_FD, down_FD = (
        (torch.randn(neurons, width, device=device) / width**0.5).to(dtype) for _ in range(3)
    )
    return gate_FD, up_FD, down_FD


def random_input(tokens: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Draws x_TD with rows of length sqrt(D): the gates of `random_ffn` are then normal."""
    x_TD = functional.normalize(torch.randn(tokens, width, device=device), dim=1)
    return (x_TD * width**0.5).to(dtype)


def with_gates_off(x_TD: Tensor, sparsity: float) -> Tensor:
    """Scales x_TD: that share of its normal gates then stays below the threshold of `FATRELU`."""
    limit = max(float(torch.special.ndtri(torch.tensor(sparsity))), 1e-3)
    return x_TD / limit


def random_masks(count: int, tokens: int, experts: int, sparsity: float) -> list[Tensor]:
    """Draws masks mask_TE: in each, random experts are on for each token."""
    on = max(1, round(experts * (1 - sparsity)))
    scores = torch.rand(count, tokens, experts)
    chosen = scores.topk(on, dim=-1).indices
    return list(torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True))


def dense_ffn(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
    """Computes a gated FFN by `BASELINE`; it reads down as (D, F), which changes no time."""
    h_TF = functional.silu(linear(x_TD, gate_FD)) * linear(x_TD, up_FD)
    return linear(h_TF, down_FD.view(x_TD.shape[1], -1))
