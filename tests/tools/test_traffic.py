"""Loads are counted inside the block, and there alone."""

from __future__ import annotations

import pytest
import torch

from moe_tools.kernels.weights import FFNWeights

pytest.importorskip("triton")

from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.ffn import sparse_ffn_triton
from tools.traffic import count_loads

TINY = Config(16, 16, 4, 16, 8, 16, 2, 4)


def test_counting_ends_with_its_block() -> None:
    weights, x_TD = FFNWeights(torch.randn(7, 5), torch.randn(7, 5), "silu"), torch.randn(1, 5)
    with count_loads() as loads:
        sparse_ffn_triton(weights, x_TD, config=TINY)
    before = loads.bytes_of(weights.up_FD)
    sparse_ffn_triton(weights, x_TD, config=TINY)
    assert loads.bytes_of(weights.up_FD) == before == 4 * 7 * 5
