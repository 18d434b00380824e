"""What is stored can be read back, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.kernels.cpu.ffn_rows import pack_rows
from moe_tools.kernels.cpu.memory import LINE
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.rows import (
    BITS,
    DTYPES,
    FLOATS,
    read_rows,
    row_bytes,
    rows_as,
    write_rows,
)
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


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 70),
    st.integers(1, 300) | st.sampled_from([1, 31, 32, 33, 127, 128, 129]),
    st.sampled_from(list(BITS)),
    st.sampled_from(["multiplied", "added"]),
    st.sampled_from(FLOATS),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(isas()),
)
def test_the_kernels_read_the_same_numbers(
    rows: int,
    width: int,
    dtype: torch.dtype,
    order: Any,
    to: torch.dtype,
    offset: float,
    isa: str,
) -> None:
    """Bit by bit, of rows that lie apart."""
    apart = torch.zeros(rows, 2, row_bytes(width, dtype), dtype=torch.uint8)
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width))
    write_rows(apart[:, 1], drawn, dtype, order)
    # an offset is that of copies in few bits, which are multiplied
    offset = offset if dtype not in (torch.int8,) and order == "multiplied" else 0.0
    expected_FD = read_rows(apart[:, 1], width, dtype, order, offset=offset).to(to)
    found_FD = rows_as(apart[:, 1], width, dtype, to, order, offset=offset, isa=isa)
    assert torch.equal(found_FD, expected_FD)
