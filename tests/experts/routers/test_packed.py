"""Routers whose rows the native kernels read: the same scores, weights that stay their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routers import SigmoidRouter
from moe_tools.experts.routers.base import LinearFP32, ProductFP32
from moe_tools.inference.optimized import optimize
from tests.families import build

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
}


def router(dtype: torch.dtype = torch.float32, width: int = 64, routed: int = 10) -> SigmoidRouter:
    torch.manual_seed(0)
    made = SigmoidRouter(width, routed)
    nn.init.normal_(made.weight), nn.init.normal_(made.bias)
    return made.to(dtype).requires_grad_(False)


def packed(dtype: torch.dtype = torch.float32, **sizes: int) -> SigmoidRouter:
    made = router(dtype, **sizes)
    made.pack()
    return made


def assert_same(one: nn.Module, other: nn.Module, x_TD: Tensor | None = None) -> None:
    x_TD = torch.randn(3, 64) if x_TD is None else x_TD
    ours, theirs = one(x_TD), other(x_TD)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 70])
@every_dtype
def test_scores_are_what_they_were(dtype: torch.dtype, tokens: int, x_dtype: torch.dtype) -> None:
    made = packed(dtype)
    assert made.packed is not None
    assert_same(made, router(dtype), torch.randn(tokens, 64).to(x_dtype))
    assert_same(made, router(dtype), torch.randn(2, tokens, 64).to(x_dtype))


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_packed_too(dtype: torch.dtype, bias: bool) -> None:
    linear = LinearFP32(64, 10, bias=bias).to(dtype).requires_grad_(False)
    made = copy.deepcopy(linear)
    made.pack()
    assert made.packed is not None
    assert_same(made, linear)


@every_dtype
def test_the_weight_stays_in_the_state_dict(dtype: torch.dtype) -> None:
    ours, theirs = packed(dtype).state_dict(), router(dtype).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == dtype and torch.equal(ours[name], value)


@every_dtype
def test_changes_in_place_are_followed(dtype: torch.dtype) -> None:
    made, other = packed(dtype), router(dtype)
    for one in (made, other):
        one.weight.mul_(2)
        one.bias.add_(1)
    assert_same(made, other)
    other.weight.neg_()
    made.load_state_dict(other.state_dict())
    assert_same(made, other)
    assert made.packed is not None


def by_data(made: SigmoidRouter, weight_RD: Tensor) -> None:
    made.weight.data = weight_RD


def by_parameter(made: SigmoidRouter, weight_RD: Tensor) -> None:
    made.weight = nn.Parameter(weight_RD, requires_grad=False)


def by_loading(made: SigmoidRouter, weight_RD: Tensor) -> None:
    made.load_state_dict({"weight": weight_RD, "bias": made.bias.detach()}, assign=True)


@pytest.mark.parametrize("change", [by_data, by_parameter, by_loading])
def test_so_is_another_weight(change: Any) -> None:
    made, other = packed(), router()
    other.weight.neg_()
    change(made, other.weight.detach().clone())
    assert_same(made, other)


def test_a_cast_is_followed_and_packs_anew() -> None:
    made, other = packed(), router()
    for dtype in (torch.bfloat16, torch.float32):
        made.to(dtype), other.to(dtype)
        assert made.packed is not None and made.packed.dtype == made.weight.dtype == dtype
        assert_same(made, other)
        made.weight.mul_(2), other.weight.mul_(2)
        assert_same(made, other)


def test_to_where_no_kernel_reads_it_is_not_packed() -> None:
    assert packed().double().packed is None
    assert packed().to("meta").packed is None


@pytest.mark.parametrize("way", COPIES)
@every_dtype
def test_copies_are_packed_and_independent(dtype: torch.dtype, way: str) -> None:
    made = packed(dtype)
    copied = COPIES[way](made)
    assert copied.packed is not None and copied.packed is not made.packed
    assert "was_packed" not in copied.__dict__
    assert_same(copied, made)
    copied.weight.neg_()
    assert_same(made, router(dtype))
    assert not torch.allclose(copied(torch.ones(1, 64)), made(torch.ones(1, 64)))
    assert_same(COPIES[way](copied), copied)


def test_a_shallow_copy_and_its_original_follow_the_weight_they_share() -> None:
    made = packed()
    copied = copy.copy(made)
    made.weight.mul_(2)
    expected = router()
    expected.weight.mul_(2)
    assert_same(made, expected)
    assert_same(copied, expected)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_what_is_not_packed_are_not(way: str) -> None:
    copied = COPIES[way](router())
    assert copied.packed is None and "was_packed" not in copied.__dict__
    assert_same(copied, router())


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 33), (torch.bfloat16, 48)])
def test_odd_widths_stay_as_they_are(dtype: torch.dtype, width: int) -> None:
    """Their rows fill no whole cache lines, so that a weight could not be a view of them."""
    made = packed(dtype, width=width)
    assert made.packed is None
    assert_same(made, router(dtype, width=width), torch.randn(3, width))


@every_dtype
@pytest.mark.parametrize("kind", ["sigmoid", "bottleneck", "low_rank", "mlp"])
def test_routers_of_an_optimised_model_are_packed(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build("llama", hidden_size=64)
    selector = {"kind": "threshold", "tau": 0.5}
    options = {"rank": 32} if kind in ("low_rank", "bottleneck") else {}
    attach_experts(model, Conversion("donor", 8, kind, selector, router_options=options))
    for module in model.modules():
        if isinstance(module, ProductFP32):
            nn.init.normal_(module.weight)
    model.to(dtype)
    fast = optimize(copy.deepcopy(model))
    for ours, theirs in zip(expert_ffns(fast), expert_ffns(model), strict=True):
        products = [one for one in ours.router.modules() if isinstance(one, ProductFP32)]
        whole = [one for one in products if one.weight.shape[1] * dtype.itemsize % 64 == 0]
        assert whole and all((one.packed is not None) == (one in whole) for one in products)
        assert_same(ours.router, theirs.router)
        state, before = ours.router.state_dict(), theirs.router.state_dict()
        assert state.keys() == before.keys()
    state, before = fast.state_dict(), model.state_dict()
    assert state.keys() == before.keys()
    for name, value in before.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)
