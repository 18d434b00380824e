"""Speed: which kernels there are."""

from __future__ import annotations

from typing import get_args

from moe_tools.kernels.sparse_ffn import Backend


def backends() -> list[str]:
    """The kernel backends by name, without `auto`, which chooses among them."""
    return [name for name in get_args(Backend) if name != "auto"]
