"""The native dense product against PyTorch's, on every instruction set."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.kernels.cpu.linear import FEW, CpuLinear
from moe_tools.kernels.cpu.memory import LINE
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.rows import BITS, DTYPES, FLOATS
from moe_tools.kernels.few_bits import copy_rows, group_int8, store_rows

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def stored(weight_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as it is multiplied, in float64."""
    if dtype in BITS:
        return store_rows(weight_ND, BITS[dtype]).values_FD().double()
    return weight_ND.to(dtype).double()


def exact(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, integers: bool) -> Tensor:
    x_TD = group_int8(x_TD.float()) if integers else x_TD
    y_TN = x_TD.double() @ weight_ND.T
    return y_TN if bias_N is None else y_TN + bias_N.double()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 70) | st.sampled_from([3, 4, 5, 64, 65, 300])),
        "width": draw(st.integers(1, 70) | st.sampled_from([127, 128, 129, 511, 513, 1100, 9000])),
        "leading": draw(
            st.sampled_from([(), (0,), (1,), (2,), (3, 1), (FEW,), (FEW + 1,), (300,)])
        ),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "x_dtype": draw(st.sampled_from(FLOATS)),
        "isa": draw(st.sampled_from(isas())),
        "threads": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_product_equals_pytorchs(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    weight_ND = torch.randn(case["rows"], case["width"]) / case["width"] ** 0.5
    bias_N = torch.randn(case["rows"]) if case["bias"] else None
    x_TD = torch.randn(*case["leading"], case["width"]).to(case["x_dtype"])
    linear = CpuLinear(weight_ND, bias_N, case["dtype"], isa=case["isa"])
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        y_TN = linear(x_TD)
    finally:
        torch.set_num_threads(before)
    assert (y_TN.shape, y_TN.dtype) == ((*case["leading"], case["rows"]), x_TD.dtype)
    integers = case["dtype"] in BITS
    expected_TN = exact(x_TD, stored(weight_ND, case["dtype"]), bias_N, integers)
    tolerance = TOLERANCES[case["x_dtype"]]
    if not integers and x_TD.numel() > FEW * case["width"]:  # a matrix product in the dtype of x
        tolerance *= 4
    torch.testing.assert_close(y_TN.double(), expected_TN, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, FEW + 1])
def test_copies_in_few_bits_are_read_as_they_are(isa: str, bits: Any, tokens: int) -> None:
    few = copy_rows(torch.randn(21, 100), bits)
    x_TD = torch.randn(tokens, 100)
    expected_TN = exact(x_TD, few.values_FD().double(), None, integers=True).float()
    y_TN = CpuLinear.of_codes(few, isa=isa)(x_TD)
    torch.testing.assert_close(y_TN, expected_TN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_infinities_and_nans_reach_every_row_that_they_meet(dtype: torch.dtype, isa: str) -> None:
    linear = CpuLinear(torch.ones(5, 70), None, dtype, isa=isa)
    for number in (float("inf"), float("nan")):
        x_TD = torch.randn(2, 70)
        x_TD[1, 40] = number
        y_TN = linear(x_TD)
        assert y_TN[0].isfinite().all() and not y_TN[1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pickle_and_a_copy_compute_the_same(dtype: torch.dtype) -> None:
    linear, x_TD = CpuLinear(torch.randn(40, 33), torch.randn(40), dtype), torch.randn(3, 33)
    assert copy.deepcopy(linear) is linear
    again = pickle.loads(pickle.dumps(linear))
    assert torch.equal(again(x_TD), linear(x_TD))
    assert again.rows_NB.data_ptr() % LINE == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_threads_nor_time_change_a_bit(threads: int) -> None:
    linear, x_TD = CpuLinear(torch.randn(3000, 96), None, torch.bfloat16), torch.randn(3, 96)
    expected_TN, before = linear(x_TD), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(linear(x_TD), expected_TN) for _ in range(20))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_compile_it_is_one_operator(dtype: torch.dtype) -> None:
    linear, x_TD = CpuLinear(torch.randn(24, 32), torch.randn(24), dtype), torch.randn(1, 32)
    compiled = torch.compile(lambda x_TD: linear(x_TD), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_TD), linear(x_TD))


def test_other_inputs_are_refused() -> None:
    linear = CpuLinear(torch.randn(4, 32), None, torch.float32)
    for x_TD in (torch.randn(2, 31), torch.randn(2, 32).double(), torch.randn(2, 32).int()):
        with pytest.raises(ValueError, match="takes 32 columns in fp32, bf16 or fp16 on the CPU"):
            linear(x_TD)
