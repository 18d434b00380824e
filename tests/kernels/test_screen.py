"""The screened gate: what a copy in eight bits lets the kernels skip, and that nothing is missed."""

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


def make(neurons: int, width: int, act: Any = "relu", gated: bool = True) -> FFNWeights:
    """Random weights of which some columns are much larger, as in trained models."""
    rows = [torch.randn(neurons, width) / width**0.5 for _ in range(3)]
    for matrix_FD in rows:
        matrix_FD[:, :: max(1, width // 3)] *= 5
    up_FD, down_FD, gate_FD = rows
    return FFNWeights(
        up_FD,
        down_FD,
        act,
        gate_FD if gated else None,
        up_F=torch.randn(neurons) / 4,
        gate_F=torch.randn(neurons) / 4 if gated else None,
    )


def both(weights: FFNWeights, screen: float, dtype: torch.dtype) -> tuple[CpuFFN, CpuFFN]:
    plain = CpuFFN(weights, dtype, or_dense=False)
    return plain, CpuFFN(weights, dtype, or_dense=False, screen=screen)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    neurons=st.integers(1, 200),
    width=st.integers(1, 300),
    tokens=st.integers(1, 8),
    act=st.sampled_from(ACTS),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_with_the_bound_the_output_is_bit_for_bit_the_same(
    neurons: int,
    width: int,
    tokens: int,
    act: Act,
    gated: bool,
    dtype: torch.dtype,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    plain, screened = both(make(neurons, width, act, gated), math.inf, dtype)
    x_TD, mask_TE = torch.randn(tokens, width) * size, torch.rand(tokens, neurons) < 0.8
    # The same neurons add up in the same order, whatever stood between them.
    torch.testing.assert_close(screened(x_TD, mask_TE), plain(x_TD, mask_TE), rtol=1e-5, atol=1e-6)
    assert missed(plain, screened, x_TD) == 0


def missed(plain: CpuFFN, screened: CpuFFN, x_TD: Tensor) -> int:
    """Neurons that fire, and whose way down the screened FFN did not go."""
    gates, parts = plain.weights.neurons, len(plain.weights.inputs)
    behind = [plain.rows_read(x_1D) - gates for x_1D in x_TD.split(1)]
    kept = [screened.rows_read(x_1D) for x_1D in x_TD.split(1)]
    # A neuron that is kept costs its gate row; one that fires then costs the `parts` rows behind it.
    fired = [count // parts for count in behind]
    firing = [_firing(screened, x_1D) for x_1D in x_TD.split(1)]
    assert all(read >= count * (parts + 1) for read, count in zip(kept, firing, strict=True))
    return sum(fired) - sum(firing)


def _firing(packed: CpuFFN, x_1D: Tensor) -> int:
    """How many neurons fire, one at a time: a mask of single neurons says which."""
    neurons = packed.weights.neurons
    one_FF = torch.eye(neurons, dtype=torch.bool)
    parts = len(packed.weights.inputs)
    return sum(packed.rows_read(x_1D, one_F[None]) == parts + 1 for one_F in one_FF)


def test_four_sigmas_miss_next_to_nothing_and_skip_nearly_all_that_is_off() -> None:
    """2,048 x 4,096 neurons and tokens, nine of ten of which are below the threshold."""
    weights = FFNWeights(
        torch.randn(512, 1024) / 32,
        torch.randn(512, 1024) / 32,
        Act("fatrelu", 1.28),
        torch.randn(512, 1024) / 32,
    )
    fired = {}
    reads = {}
    for screen in (None, 4.0, math.inf):
        packed = CpuFFN(weights, torch.bfloat16, or_dense=False, screen=screen)
        x_TD = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
        reads[screen] = sum(packed.rows_read(x_1D) for x_1D in x_TD.split(1))
        fired[screen] = packed(x_TD[:8]).float()
    down_rows = (reads[None] - 64 * 512) // 2  # neurons that fire: up and down behind every gate
    assert 0.09 < down_rows / (64 * 512) < 0.11
    # Rows of the screened: a gate of what is kept, up and down of what fires.
    missed = 3 * down_rows - (reads[4.0] - (reads[4.0] - 3 * down_rows))
    assert missed == 0
    kept = {s: reads[s] - 2 * down_rows for s in (4.0, math.inf)}
    assert kept[4.0] < 1.1 * down_rows
    assert kept[4.0] < kept[math.inf] < 3 * down_rows
    torch.testing.assert_close(fired[4.0], fired[None], rtol=0.02, atol=0.02)
    assert torch.equal(fired[math.inf], fired[None])


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
    weights = make(6, 4, options.get("act", "relu"))
    with pytest.raises(ValueError, match=message):
        pack(weights, dtype=options.get("dtype"), screen=options.get("screen", 4.0))
