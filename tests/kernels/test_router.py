"""`CpuRouter` against the router and the selectors in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.experts.selectors import Threshold, TopK
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.router import CpuRouter

SIZES = [(1, 64), (7, 64), (64, 96), (65, 128), (300, 64)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores_TE(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    return torch.sigmoid(torch.nn.functional.linear(x_TD.float(), weight_ED.float(), bias_E))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "width"), SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_it_chooses_as_pytorch_does(
    tokens: int, experts: int, width: int, dtype: torch.dtype, isa: str
) -> None:
    weight_ED, bias_E = numbers(experts, width, seed=1).to(dtype), numbers(experts, seed=2)
    x_TD = numbers(tokens, width).to(dtype)
    linear = CpuLinear(weight_ED, None, dtype, isa=isa)
    expected_TE = scores_TE(x_TD, weight_ED, bias_E)
    above = CpuRouter(linear, bias_E, by_rank=False)
    wrong_TE = above(x_TD, 0.5) != Threshold(0.5)(expected_TE)
    assert (expected_TE[wrong_TE] - 0.5).abs().lt(1e-4).all()
    count = max(1, experts // 3)
    highest = CpuRouter(linear, bias_E, by_rank=True)(x_TD, count)
    assert highest.sum(-1).eq(count).all()
    limit_T1 = expected_TE.topk(count).values[:, -1:]
    wrong_TE = highest != TopK(count)(expected_TE)
    assert ((expected_TE - limit_T1)[wrong_TE]).abs().lt(1e-4).all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "middle", "width"), [(9, 5, 64), (300, 48, 576), (70, 33, 65)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_two_linears_choose_as_pytorch_does(
    tokens: int, experts: int, middle: int, width: int, dtype: torch.dtype, isa: str
) -> None:
    first_KD = (numbers(middle, width, seed=3) / width**0.5).to(dtype)
    second_EK, bias_E = numbers(experts, middle, seed=1).to(dtype), numbers(experts, seed=2)
    x_TD = numbers(tokens, width).to(dtype)
    first, second = (CpuLinear(one, None, dtype, isa=isa) for one in (first_KD, second_EK))
    z_TK = torch.nn.functional.linear(x_TD.float(), first_KD.float())
    expected_TE = scores_TE(z_TK, second_EK, bias_E)
    above = CpuRouter(second, bias_E, by_rank=False, first=first)
    wrong_TE = above(x_TD, 0.5) != Threshold(0.5)(expected_TE)
    assert (expected_TE[wrong_TE] - 0.5).abs().lt(1e-3).all()
    count = max(1, experts // 3)
    highest = CpuRouter(second, bias_E, by_rank=True, first=first)(x_TD, count)
    assert highest.sum(-1).eq(count).all()
    with pytest.raises(ValueError, match=f"takes {width} columns"):
        above(torch.zeros(1, middle), 0.5)


def test_of_equal_scores_the_lower_experts_come_first() -> None:
    linear = CpuLinear(torch.zeros(9, 64), None, torch.float32)
    bias_E = torch.tensor([0.0, 40.0, 50.0, 1.0, 60.0, 1.0, 1.0, 0.0, 0.0])  # three are 1 as scores
    router = CpuRouter(linear, bias_E, by_rank=True)
    for count, expected in ((2, [1, 2]), (3, [1, 2, 4]), (5, [1, 2, 3, 4, 5]), (9, range(9))):
        assert router(torch.zeros(1, 64), count)[0].nonzero().flatten().tolist() == list(expected)


def test_nan_counts_as_the_highest_and_is_above_nothing() -> None:
    linear = CpuLinear(torch.zeros(4, 64), None, torch.float32)
    bias_E = torch.tensor([1.0, float("nan"), 2.0, float("nan")])
    x_TD = torch.zeros(1, 64)
    chosen = CpuRouter(linear, bias_E, by_rank=True)(x_TD, 3)
    assert chosen[0].tolist() == [False, True, True, True]
    assert CpuRouter(linear, bias_E, by_rank=False)(x_TD, 0.1)[0].tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_a_bias_that_is_changed_is_followed_and_none_is_zero() -> None:
    linear, bias_E = CpuLinear(torch.zeros(3, 64), None, torch.float32), torch.zeros(3)
    router, plain = (CpuRouter(linear, bias, by_rank=False) for bias in (bias_E, None))
    x_TD = torch.zeros(2, 64)
    assert not router(x_TD, 0.6).any() and not plain(x_TD, 0.6).any() and plain(x_TD, 0.4).all()
    bias_E[1] = 3.0
    assert router(x_TD, 0.6).tolist() == [[False, True, False]] * 2


def test_two_linears_fit_each_other() -> None:
    first, second = (CpuLinear(torch.zeros(3, 64), None, torch.float32) for _ in range(2))
    with pytest.raises(ValueError, match="takes 64 numbers, and the first gives 3"):
        CpuRouter(second, None, by_rank=False, first=first)


def test_what_does_not_fit_is_refused() -> None:
    linear = CpuLinear(torch.zeros(3, 64), None, torch.float32)
    router = CpuRouter(linear, None, by_rank=True)
    for x_TD in (torch.zeros(1, 65), torch.zeros(1, 64).long()):
        with pytest.raises(ValueError, match="takes 64 columns"):
            router(x_TD, 1)
    with pytest.raises(ValueError, match="give a number of 1 or more"):
        router(torch.zeros(1, 64), 0)
