"""How fast this machine's memory can be read."""

from __future__ import annotations

import torch

from moe_tools.bench.rounds import seconds

READ = 256 * 2**20
"""Bytes: more than a cache holds."""
REPEATS = 5


def read_rate(device: str, size: int = READ) -> float:
    """Bytes a second that a sum over `size` bytes reads, at best of five."""
    buffer = torch.ones(max(1, size // 4), device=device)
    # the number is waited for, also on a GPU
    return size / min(seconds(lambda: float(buffer.sum())) for _ in range(REPEATS))
