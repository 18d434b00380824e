"""Compares what we make of a host's experts with what the host itself computes, on random tokens.

Letters: T tokens, D model width, X experts of the host, K experts of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_tools.hosts.fused import Storage

TOKENS = 3
SPREAD = 5.0
"""Standard deviation of the tokens: limits of 7 or 10 show only in large numbers."""
LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest output, by dtype."""
HALF_ERROR = 0.05


@torch.no_grad()
def prove_experts(
    path: str, theirs: nn.Module, ours: nn.Module, storage: Storage, choices: int
) -> None:
    """Runs both on the same tokens; weights that are not there yet (meta) prove nothing.

    Args:
        path: of the module.
        theirs: the host's fused experts.
        ours: of the same weights.
        storage: how the host keeps them.
        choices: how many experts its router knows.

    Raises:
        ValueError: they differ.
    """
    up = theirs.get_parameter(storage.up)
    if up.is_meta:
        return
    inputs = _inputs(up, storage, choices)
    expected, found = (made(*inputs).float().flatten(0, -2) for made in (theirs, ours))
    error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= LARGEST_ERROR.get(up.dtype, HALF_ERROR):
        raise ValueError(
            f"{path}: {type(theirs).__name__} computes something else than an FFN an expert, off "
            f"by {error:.1%} of the largest output: leave this model dense"
        )


def _inputs(up: Tensor, storage: Storage, choices: int) -> tuple[Tensor, ...]:
    width = up.shape[1 if storage.transposed else -1]
    draw = torch.Generator().manual_seed(0)
    rows = TOKENS * choices if storage.calls == "every" else TOKENS
    x_TD = SPREAD * torch.randn(rows, width, generator=draw)
    if storage.calls == "every":
        return (x_TD.to(up),)
    chosen_TK = torch.rand(TOKENS, choices, generator=draw).argsort(-1)
    weight_TK = torch.rand(TOKENS, choices, generator=draw)
    if storage.calls == "weighed":
        return x_TD.to(up), weight_TK.to(up)
    return x_TD.to(up), chosen_TK.to(up.device), weight_TK.to(up)
