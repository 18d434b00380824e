"""What is stored can be read back, bit by bit."""

from __future__ import annotations

import pytest
import torch

from moe_tools.kernels.cpu.ffn_rows import pack_rows
from moe_tools.kernels.cpu.memory import LINE
from moe_tools.kernels.cpu.rows import DTYPES
from moe_tools.kernels.quantize import rounded
from moe_tools.kernels.weights import FFNWeights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 128, 300])
def test_every_part_reads_back_as_it_was_rounded(dtype: torch.dtype, width: int) -> None:
    weights = FFNWeights(*torch.randn(2, 7, width), "silu", torch.randn(7, width))
    rows, expected = pack_rows(weights, dtype), rounded(weights, dtype)
    parts = (expected.gate_FD, expected.up_FD, expected.down_FD)
    for part, expected_FD in enumerate(parts):
        assert torch.equal(rows.matrix_FD(part, torch.float32), expected_FD.float())


@pytest.mark.parametrize(("dtype", "share"), [(torch.int8, 1.0625), (torch.int4, 0.5625)])
def test_a_row_takes_the_bytes_that_it_should(dtype: torch.dtype, share: float) -> None:
    rows = pack_rows(FFNWeights(*torch.randn(2, 3, 4096), "silu"), dtype)
    assert rows.bytes_FPB.shape[-1] == 4096 * share
    assert rows.bytes_FPB.data_ptr() % LINE == 0
