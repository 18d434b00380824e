from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.quantize import (
    QUANTIZED,
    quantize_rows,
    rounded,
)
from moe_tools.kernels.weights import FFNWeights


def test_a_row_is_off_by_half_a_step_at_most() -> None:
    weight_FD = torch.randn(20, 33) * torch.logspace(-6, 6, 20)[:, None]
    rows_FD, scale_F = quantize_rows(weight_FD)
    assert rows_FD.dtype == torch.int8
    assert rows_FD.abs().amax(1).eq(127).all()
    error_FD = (rows_FD * scale_F[:, None] - weight_FD).abs()
    assert (error_FD <= 0.5001 * scale_F[:, None]).all()


def test_a_row_of_zeros_stays_zero() -> None:
    rows_FD, scale_F = quantize_rows(torch.zeros(2, 3))
    assert not (rows_FD * scale_F[:, None]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.int4], ids=str)
def test_rounding_twice_is_rounding_once(dtype: torch.dtype) -> None:
    def matrix() -> Tensor:
        return torch.randn(6, 4)

    weights = FFNWeights(matrix(), matrix(), "silu", gate_FD=matrix(), down_D=torch.randn(4))
    once = rounded(weights, dtype)
    twice = rounded(once, dtype)
    kept = torch.float32 if dtype in QUANTIZED else dtype
    for name in ("up_FD", "down_FD", "gate_FD", "down_D"):
        assert getattr(once, name).dtype == kept
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=1e-6, atol=0.0)
    assert once.up_F is None
