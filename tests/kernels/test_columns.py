"""Products from columns: PyTorch's numbers, whatever is zero, and nothing read that meets zeros."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.bench.generate import threads
from moe_tools.kernels.cpu.columns import FEW, CpuColumns
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.rows import DTYPES, FLOATS

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 70) | st.sampled_from([127, 128, 129, 513, 1100, 5000])),
        "width": draw(st.integers(1, 70) | st.sampled_from([3, 4, 5, 300, 900])),
        "leading": draw(st.sampled_from([(), (0,), (1,), (2, 1), (5,), (FEW,), (FEW + 1,)])),
        "share": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "x_dtype": draw(st.sampled_from(FLOATS)),
        "isa": draw(st.sampled_from(isas())),
        "threads": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_product_equals_pytorchs(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    weight_ND = torch.randn(case["rows"], case["width"]) / case["width"] ** 0.5
    bias_N = torch.randn(case["rows"]) if case["bias"] else None
    x_TD = torch.randn(*case["leading"], case["width"])
    x_TD = (x_TD * (torch.rand_like(x_TD) < case["share"])).to(case["x_dtype"])
    columns = CpuColumns(weight_ND, bias_N, case["dtype"], isa=case["isa"])
    with threads(case["threads"]):
        y_TN = columns(x_TD)
    assert (y_TN.shape, y_TN.dtype) == ((*case["leading"], case["rows"]), x_TD.dtype)
    expected_TN = x_TD.double() @ columns.weight_ND().double().T
    expected_TN = expected_TN if bias_N is None else expected_TN + bias_N.double()
    tolerance = TOLERANCES[case["x_dtype"]]
    # int4 rounds x times a scale to bf16 where the CPU multiplies bf16
    tolerance = max(tolerance, 1e-2) if case["dtype"] == torch.int4 else tolerance
    torch.testing.assert_close(y_TN.double(), expected_TN, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_columns_that_meet_zeros_are_not_read(dtype: torch.dtype) -> None:
    weight_ND = torch.randn(70, 9)
    weight_ND[:, ::2] = float("nan")
    x_TD = torch.randn(3, 9)
    x_TD[:, ::2] = 0
    y_TN = CpuColumns(weight_ND, None, dtype)(x_TD)
    torch.testing.assert_close(y_TN, x_TD[:, 1::2] @ weight_ND[:, 1::2].T, rtol=2e-2, atol=2e-2)


def test_infinities_and_nans_of_x_are_no_zeros() -> None:
    columns = CpuColumns(torch.ones(5, 70), None, torch.float32)
    for number in (float("inf"), float("nan")):
        x_TD = torch.zeros(2, 70)
        x_TD[1, 40] = number
        y_TN = columns(x_TD)
        assert y_TN[0].isfinite().all() and not y_TN[1].isfinite().any()


@pytest.mark.parametrize("tokens", [1, FEW])
def test_threads_change_no_bit(tokens: int) -> None:
    columns = CpuColumns(torch.randn(4000, 900), None, torch.bfloat16)
    x_TD = torch.randn(tokens, 900).bfloat16()
    expected_TN = columns(x_TD)
    for count in (1, 2, 5):
        with threads(count):
            assert torch.equal(columns(x_TD), expected_TN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pickle_and_a_copy_compute_the_same(dtype: torch.dtype) -> None:
    columns = CpuColumns(torch.randn(33, 20), torch.randn(33), dtype)
    x_TD = torch.randn(2, 20)
    for other in (pickle.loads(pickle.dumps(columns)), copy.deepcopy(columns)):
        assert torch.equal(other(x_TD), columns(x_TD))


@pytest.mark.parametrize(
    ("x_TD", "message"),
    [
        (
            torch.randn(2, 8),
            r"^x_TD is \(2, 8\), torch.float32 on cpu: this linear takes 9 columns",
        ),
        (torch.zeros(2, 9, dtype=torch.int64), r"^x_TD is \(2, 9\), torch.int64 on cpu"),
    ],
    ids=["width", "dtype"],
)
def test_what_does_not_fit_is_refused(x_TD: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CpuColumns(torch.randn(5, 9), None, torch.float32)(x_TD)
