"""Predicted lists of neurons: a mask with one expert a neuron, with and without the exact gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights

pytest.importorskip("triton")

from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.ffn import sparse_ffn_triton
from tools.traffic import count_loads

TINY = Config(16, 16, 4, 16, 8, 16, 2, 4)
WIDTH, NEURONS = 21, 45
ACTS: dict[str, tuple[str | Act, str]] = {
    "relu": ("relu", "identity"),
    "fatrelu": (Act("fatrelu", 0.5), "identity"),
    "drelu": ("relu", "relu"),
}
every_case = pytest.mark.parametrize("name", ACTS)
tokens_one_or_more = pytest.mark.parametrize("tokens", [1, 5])


def make(name: str) -> FFNWeights:
    act, up_act = ACTS[name]
    up_FD, down_FD, gate_FD = (torch.randn(NEURONS, WIDTH) for _ in range(3))
    return FFNWeights(up_FD, down_FD, act, gate_FD, up_act=up_act)


def given(name: str, tokens: int) -> tuple[FFNWeights, Tensor, Tensor, Tensor]:
    """Weights, x, a list that is wrong both ways, and which neurons really fire."""
    weights, x_TD = make(name), torch.randn(tokens, WIDTH)
    assert weights.gate_FD is not None
    act = weights.inputs[0][2]
    fires_TF = act(x_TD @ weights.gate_FD.T) != 0
    predicted_TF = fires_TF ^ (torch.rand(tokens, NEURONS) < 0.3)
    assert (predicted_TF & ~fires_TF).any() and (fires_TF & ~predicted_TF).any()
    return weights, x_TD, predicted_TF, fires_TF


def run(weights: FFNWeights, x_TD: Tensor, list_TF: Tensor, **options: Any) -> Tensor:
    return sparse_ffn_triton(weights, x_TD, list_TF, config=TINY, **options)


def listed(on_TF: Tensor) -> list[int]:
    return on_TF.any(0).nonzero().flatten().tolist()


@every_case
@tokens_one_or_more
@pytest.mark.parametrize("recheck", [True, False])
def test_a_list_gives_the_reference_of_the_exact_gate_within_it(
    name: str, tokens: int, recheck: bool
) -> None:
    weights, x_TD, predicted_TF, fires_TF = given(name, tokens)
    y_TD = run(weights, x_TD, predicted_TF, gate_first=recheck)
    expected_TD = sparse_ffn_reference(weights, x_TD, predicted_TF & fires_TF)
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-6 * largest)


@every_case
@tokens_one_or_more
def test_what_the_check_drops_changes_no_bit(name: str, tokens: int) -> None:
    weights, x_TD, predicted_TF, fires_TF = given(name, tokens)
    y_TD = run(weights, x_TD, predicted_TF, gate_first=True)
    assert torch.equal(y_TD, run(weights, x_TD, predicted_TF & fires_TF, gate_first=True))


@pytest.mark.interpreter
@tokens_one_or_more
@pytest.mark.parametrize("recheck", [True, False])
def test_the_check_reads_up_rows_of_firing_neurons_alone(tokens: int, recheck: bool) -> None:
    weights, x_TD, predicted_TF, fires_TF = given("relu", tokens)
    with count_loads() as loads:
        run(weights, x_TD, predicted_TF, gate_first=recheck)
    both_TF = predicted_TF & fires_TF
    assert weights.gate_FD is not None
    assert loads.rows_of(weights.gate_FD) == listed(predicted_TF)
    assert loads.rows_of(weights.up_FD) == listed(both_TF if recheck else predicted_TF)
    assert loads.rows_of(weights.down_FD) == listed(both_TF)


def test_an_activation_without_zeros_has_nothing_to_check() -> None:
    weights = FFNWeights(torch.randn(NEURONS, WIDTH), torch.randn(NEURONS, WIDTH), "silu")
    list_TF = torch.rand(2, NEURONS) < 0.5
    with pytest.raises(ValueError, match=r"^gate_first needs an activation that can"):
        run(weights, torch.randn(2, WIDTH), list_TF, gate_first=True)
