from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_tools.kernels.activations import NAMES, Act, named


def test_every_name_is_its_formula() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = {
        Act("identity"): x,
        Act("relu"): x.clamp(min=0),
        Act("relu2"): x.clamp(min=0) ** 2,
        Act("fatrelu", 0.5): torch.where(x >= 0.5, x, 0.0),
        Act("shifted_relu", 0.5): (x - 0.5).clamp(min=0),
        Act("silu"): x * x.sigmoid(),
        Act("gelu"): x * (1 + (x / 2**0.5).erf()) / 2,
        Act("gelu_tanh"): F.gelu(x, approximate="tanh"),
    }
    assert {act.name for act in expected} == set(NAMES)
    for act, y in expected.items():
        torch.testing.assert_close(act(x), y, rtol=1e-12, atol=1e-12, msg=act.name)


def test_a_name_is_an_act_and_a_function_stays() -> None:
    assert named("silu") == Act("silu")
    assert named(Act("fatrelu", 0.1)) == Act("fatrelu", 0.1)
    assert named(torch.tanh) is torch.tanh


@pytest.mark.parametrize(
    ("name", "theta", "message"),
    [
        ("selu", 0.0, r"^unknown activation 'selu'; known: identity, relu, "),
        ("relu", 0.1, r"^the threshold is 0.1: relu takes none$"),
        ("fatrelu", -0.1, r"^the threshold is -0.1: fatrelu takes a number of 0 or more$"),
        ("fatrelu", float("nan"), r"^the threshold is nan: fatrelu takes a number of 0 or more$"),
    ],
)
def test_what_is_no_activation_is_named(name: str, theta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Act(name, theta)
