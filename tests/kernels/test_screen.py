"""The screened gate: what a copy in eight bits leaves out, and that nothing is missed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

ACTS = [Act("relu"), Act("relu2"), Act("fatrelu", 0.7), Act("shifted_relu", 0.4)]


def make(width: int, act: Any = "relu", gated: bool = True, outliers: float = 5.0) -> FFNWeights:
    """As many neurons as columns and a W_down of ones: y shows each h. Some columns are large."""
    up_FD, gate_FD = (torch.randn(width, width) / width**0.5 for _ in range(2))
    for matrix_FD in (up_FD, gate_FD):
        matrix_FD[:, :: max(1, width // 3)] *= outliers
    biases = {"up_F": torch.randn(width) / 4, "gate_F": torch.randn(width) / 4 if gated else None}
    return FFNWeights(up_FD, torch.eye(width), act, gate_FD if gated else None, **biases)


def h_of(weights: FFNWeights, dtype: torch.dtype, x_TD: Tensor, screen: float | None) -> Tensor:
    """h_TF, a few tokens at a time: the screen is for few."""
    packed = CpuFFN(weights, dtype, or_dense=False, screen=screen)
    return torch.cat([packed(part_TD) for part_TD in x_TD.split(4)])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    width=st.integers(1, 300),
    tokens=st.integers(1, 8),
    act=st.sampled_from(ACTS),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_the_bound_misses_nothing(
    width: int,
    tokens: int,
    act: Act,
    gated: bool,
    dtype: torch.dtype,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weights, x_TD = make(width, act, gated), torch.randn(tokens, width) * size
    h_TF, screened_TF = (h_of(weights, dtype, x_TD, screen) for screen in (None, math.inf))
    assert not ((h_TF != 0) & (screened_TF == 0)).any()
    torch.testing.assert_close(screened_TF, h_TF, rtol=1e-5, atol=1e-5)


def test_a_neuron_that_is_off_stays_off() -> None:
    weights, x_TD = make(100), torch.randn(3, 100)
    packed = CpuFFN(weights, torch.float32, screen=math.inf)
    mask_TE = torch.rand(3, 100) < 0.5
    assert not packed(x_TD, mask_TE)[~mask_TE].any()


def test_four_sigmas_miss_next_to_nothing_and_skip_nearly_all_that_is_off() -> None:
    weights, x_TD = make(1024, Act("fatrelu", 1.28), outliers=1.0), torch.randn(64, 1024)
    h_TF, screened_TF = (h_of(weights, torch.float32, x_TD, screen) for screen in (None, 4.0))
    fires_TF = h_TF != 0
    assert fires_TF.sum() > 6000
    assert (fires_TF & (screened_TF == 0)).sum() <= 1  # 6e-5 of those at the very threshold

    def gates_read(screen: float) -> int:
        packed = CpuFFN(weights, torch.float32, screen=screen)
        rows = sum(packed.rows_read(x_1D) for x_1D in x_TD.split(1))
        return rows - 2 * int(fires_TF.sum())

    assert gates_read(4.0) < 1.1 * fires_TF.sum()
    assert gates_read(4.0) < gates_read(math.inf) < 4 * fires_TF.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"screen": 0.0}, r"^screen is 0.0: give the margin in sigmas, above 0, or inf"),
        ({"screen": math.nan}, r"^screen is nan: give the margin"),
        ({"act": "silu"}, r"^a screen needs an activation that is zero below a number: relu, "),
        ({"dtype": torch.int8}, r"^a screen is of eight bits, weights in torch.int8 are no larger"),
    ],
)
def test_what_cannot_be_screened_is_said(options: dict[str, Any], message: str) -> None:
    weights = make(6, options.get("act", "relu"))
    with pytest.raises(ValueError, match=message):
        pack(weights, dtype=options.get("dtype"), screen=options.get("screen", 4.0))
