"""Every activation against its formula, and the one form of what an FFN computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_tools.hosts.activations import ACTIVATIONS, build_activation
from moe_tools.hosts.projections import hidden_TF

SPECS: dict[str, dict[str, Any]] = {
    "relu": {"kind": "relu"},
    "relu2": {"kind": "relu2"},
    "shifted_relu": {"kind": "shifted_relu", "shift": 0.5},
    "fatrelu": {"kind": "fatrelu", "theta": 0.5},
    "drelu": {"kind": "drelu"},
    "swish_beta": {"kind": "swish_beta", "beta": 0.0},
}
every_kind = pytest.mark.parametrize("kind", SPECS)
numbers = st.floats(-4, 4, width=32)

X_T = torch.tensor([-2.0, -0.5, 0.0, 0.25, 0.5, 2.0])
BY_HAND = {
    "relu": [0.0, 0.0, 0.0, 0.25, 0.5, 2.0],
    "relu2": [0.0, 0.0, 0.0, 0.0625, 0.25, 4.0],
    "shifted_relu": [0.0, 0.0, 0.0, 0.0, 0.0, 1.5],
    "fatrelu": [0.0, 0.0, 0.0, 0.0, 0.5, 2.0],
    "drelu": [0.0, 0.0, 0.0, 0.25, 0.5, 2.0],
    "swish_beta": [-1.0, -0.25, 0.0, 0.125, 0.25, 1.0],
}
SLOPES = {
    "relu": [0, 0, 0, 1, 1, 1],
    "relu2": [0, 0, 0, 0.5, 1, 4],
    "shifted_relu": [0, 0, 0, 0, 0, 1],
    "fatrelu": [0, 0, 0, 0, 1, 1],
    "drelu": [0, 0, 0, 1, 1, 1],
    "swish_beta": [0.5] * 6,
}


def test_every_activation_is_tested() -> None:
    assert set(SPECS) == set(ACTIVATIONS)


@every_kind
def test_an_activation_by_hand(kind: str) -> None:
    act = build_activation(SPECS[kind])
    assert isinstance(act, nn.Module)
    assert act(X_T).tolist() == BY_HAND[kind]
    assert hidden_TF(act, X_T).tolist() == BY_HAND[kind]  # an FFN without a gate


@every_kind
def test_a_gradient_by_hand(kind: str) -> None:
    x_T = X_T.clone().requires_grad_()
    build_activation(SPECS[kind])(x_T).sum().backward()
    assert x_T.grad is not None
    assert x_T.grad.tolist() == SLOPES[kind]


@every_kind
@given(gate=numbers, up=numbers)
def test_a_gated_ffn_multiplies_by_its_up_row(kind: str, gate: float, up: float) -> None:
    act = build_activation(SPECS[kind])
    gate_T, up_T = torch.tensor([gate]), torch.tensor([up])
    expected = act(gate_T) * (up_T.relu() if kind == "drelu" else up_T)
    assert torch.equal(hidden_TF(act, up_T, gate_T), expected)


def test_drelu_is_off_when_either_row_is_not_positive() -> None:
    gate_T, up_T = torch.tensor([-1.0, -1.0, 2.0, 2.0]), torch.tensor([-3.0, 3.0, -3.0, 3.0])
    act = build_activation(SPECS["drelu"])
    assert hidden_TF(act, up_T, gate_T).tolist() == [0.0, 0.0, 0.0, 6.0]


def test_the_host_s_own_activation_has_the_same_form() -> None:
    gate_T, up_T = torch.randn(5), torch.randn(5)
    silu = ACT2FN["silu"]
    assert torch.equal(hidden_TF(silu, up_T, gate_T), nn.functional.silu(gate_T) * up_T)
    assert torch.equal(hidden_TF(silu, up_T), nn.functional.silu(up_T))


@every_kind
def test_transformers_knows_the_stock_ones_and_no_other(kind: str) -> None:
    stock = ACTIVATIONS[kind].in_stock
    assert stock == (kind in ACT2FN)
    if stock:
        x_T = torch.randn(1000)
        assert torch.equal(build_activation(SPECS[kind])(x_T), ACT2FN[kind](x_T))


def test_swish_goes_from_silu_to_relu() -> None:
    x_T = torch.randn(1000)
    silu = build_activation({"kind": "swish_beta"})
    torch.testing.assert_close(silu(x_T), nn.functional.silu(x_T))
    sharp = build_activation({"kind": "swish_beta", "beta": 1e6})
    torch.testing.assert_close(sharp(x_T), x_T.relu(), atol=1e-6, rtol=1e-6)
    cut = build_activation({"kind": "swish_beta", "beta": 1e6, "theta": 0.5})
    clear = (x_T - 0.5).abs() > 1e-3
    fatrelu = build_activation({"kind": "fatrelu", "theta": 0.5})
    torch.testing.assert_close(cut(x_T)[clear], fatrelu(x_T)[clear])
    distances = [
        (build_activation({"kind": "swish_beta", "beta": beta})(x_T) - x_T.relu()).abs().max()
        for beta in (1.0, 2.0, 4.0, 8.0)
    ]
    assert distances == sorted(distances, reverse=True)


def test_fatrelu_at_zero_is_relu() -> None:
    x_T = torch.randn(1000)
    assert torch.equal(build_activation({"kind": "fatrelu", "theta": 0})(x_T), x_T.relu())
    assert build_activation({"kind": "fatrelu"}).theta == 0.01  # ProSparse


def nan_in(act: nn.Module) -> Tensor:
    return act(torch.tensor([math.nan]))


@every_kind
def test_nan_stays_nan(kind: str) -> None:
    assert nan_in(build_activation(SPECS[kind])).isnan().all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "rellu"}, "^unknown activation 'rellu'; did you mean 'relu'"),
        ({}, "^unknown activation ''"),
        ({"kind": "relu", "theta": 1}, r"^activation \{.*\}: .*'theta'"),
        ({"kind": "shifted_relu"}, r"^activation \{.*\}: .*'shift'"),
        ({"kind": "fatrelu", "theta": -0.1}, "^theta is -0.1, but must be a number of 0 or more$"),
        ({"kind": "fatrelu", "theta": "x"}, "^theta is 'x', but must be a number"),
        ({"kind": "fatrelu", "theta": True}, "^theta is True, but must be a number"),
        ({"kind": "fatrelu", "theta": math.nan}, "^theta is nan, but must be a number"),
        ({"kind": "shifted_relu", "shift": math.inf}, "^shift is inf, but must be a number"),
    ],
)
def test_what_is_no_activation_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_activation(spec)
