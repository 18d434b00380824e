"""Which activations give exact zeros, and how many of them there are."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from moe_tools.hosts.zeros import gives_zeros, zero_share


@pytest.mark.parametrize(
    ("name", "expected"),
    [("relu", True), ("relu2", True), ("silu", False), ("gelu", False), ("gelu_new", False)],
)
def test_relu_and_its_relatives_give_zeros(name: str, expected: bool) -> None:
    assert gives_zeros(ACT2FN[name]) == expected


def test_what_rounds_to_zero_far_out_is_no_sparsity() -> None:
    assert ACT2FN["gelu_new"](torch.tensor([-20.0])).item() == 0
    assert not gives_zeros(ACT2FN["gelu_new"])


def test_the_share_weighs_every_entry_alike() -> None:
    one, other = torch.tensor([[0.0, 1.0], [-0.0, 1e-30]]), torch.tensor([[0.0] * 6])
    assert zero_share([one, other]) == pytest.approx(8 / 10)
    assert zero_share([one.view(1, 2, 2).bfloat16()]) == 0.5
    assert zero_share([]) == 0
