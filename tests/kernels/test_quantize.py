from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.quantize import (
    QUANTIZED,
    dequantize_groups,
    quantize_groups,
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


def test_a_group_of_four_bits_is_off_by_half_a_step_at_most() -> None:
    weight_FD = torch.randn(20, 77) * torch.logspace(-6, 6, 20)[:, None]
    codes_FD, scale_FG = quantize_groups(weight_FD)
    assert scale_FG.shape == (20, 3) and codes_FD.abs().amax() == 7
    error_FD = (dequantize_groups(codes_FD, scale_FG) - weight_FD).abs()
    step_FD = scale_FG.float().repeat_interleave(32, dim=1)[:, :77]
    # A scale is off by one in 512, the largest code seven times that: 0.0137 of a step.
    assert (error_FD <= 0.514 * step_FD).all()


def test_groups_of_zeros_stay_zero() -> None:
    assert not dequantize_groups(*quantize_groups(torch.zeros(2, 40))).any()


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
