"""Which bytes are read: rows of neurons that are off never, the others once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.reference import neuron_mask
from moe_tools.kernels.weights import FFNWeights

pytest.importorskip("triton")

from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.ffn import sparse_ffn_triton
from tools.traffic import Loads, count_loads

TINY = Config(16, 16, 4, 16, 8, 16, 2, 4)
WIDTH, EXPERTS, NEURONS = 24, 9, 67
pytestmark = pytest.mark.interpreter
tokens_one_or_more = pytest.mark.parametrize("tokens", [1, 5])
half_or_not = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(act: str, up_act: str = "identity", gated: bool = True) -> FFNWeights:
    up_FD, down_FD, gate_FD = (torch.randn(NEURONS, WIDTH) for _ in range(3))
    return FFNWeights(up_FD, down_FD, act, gate_FD if gated else None, up_act=up_act)


def run(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor | None) -> Loads:
    with count_loads() as loads:
        sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY)
    return loads


def listed(on_TF: Tensor) -> list[int]:
    """Neurons that any token wants."""
    return on_TF.any(0).nonzero().flatten().tolist()


def assert_rows_read_once(loads: Loads, weight_FD: Tensor, rows: list[int]) -> None:
    assert loads.rows_of(weight_FD) == rows
    assert loads.bytes_of(weight_FD) == len(rows) * WIDTH * weight_FD.element_size()


@tokens_one_or_more
@half_or_not
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_experts_read_the_rows_of_their_union_once(
    tokens: int, dtype: torch.dtype, gated: bool
) -> None:
    dense = make("silu", gated=gated)
    weights = FFNWeights(
        dense.up_FD.to(dtype),
        dense.down_FD.to(dtype),
        "silu",
        None if dense.gate_FD is None else dense.gate_FD.to(dtype),
    )
    mask_TE = torch.rand(tokens, EXPERTS) < 0.3
    loads = run(weights, torch.randn(tokens, WIDTH).to(dtype), mask_TE)
    rows = listed(neuron_mask(mask_TE, NEURONS))
    read = [w for w in (weights.gate_FD, weights.up_FD, weights.down_FD) if w is not None]
    for weight_FD in read:
        assert_rows_read_once(loads, weight_FD, rows)
    share = len(rows) / NEURONS
    formula = len(read) * share * WIDTH * NEURONS * dtype.itemsize
    assert sum(map(loads.bytes_of, read)) == pytest.approx(formula, rel=1e-12)


@tokens_one_or_more
@pytest.mark.parametrize("masked", [True, False])
def test_gate_first_reads_up_and_down_of_firing_neurons(tokens: int, masked: bool) -> None:
    weights, x_TD = make("relu"), torch.randn(tokens, WIDTH)
    mask_TE = torch.rand(tokens, EXPERTS) < 0.5 if masked else None
    on_TF = torch.ones(tokens, NEURONS, dtype=torch.bool)
    if mask_TE is not None:
        on_TF = neuron_mask(mask_TE, NEURONS)
    assert weights.gate_FD is not None
    firing = listed(on_TF & (x_TD @ weights.gate_FD.T > 0))
    loads = run(weights, x_TD, mask_TE)
    assert_rows_read_once(loads, weights.gate_FD, listed(on_TF))
    assert_rows_read_once(loads, weights.up_FD, firing)
    assert_rows_read_once(loads, weights.down_FD, firing)


@tokens_one_or_more
def test_drelu_reads_down_where_both_fire(tokens: int) -> None:
    weights, x_TD = make("relu", "relu"), torch.randn(tokens, WIDTH)
    assert weights.gate_FD is not None
    gate_TF, up_TF = x_TD @ weights.gate_FD.T > 0, x_TD @ weights.up_FD.T > 0
    loads = run(weights, x_TD, None)
    assert_rows_read_once(loads, weights.gate_FD, list(range(NEURONS)))
    assert_rows_read_once(loads, weights.up_FD, listed(gate_TF))
    assert_rows_read_once(loads, weights.down_FD, listed(gate_TF & up_TF))


def test_an_empty_mask_reads_no_weights() -> None:
    weights = make("silu")
    loads = run(weights, torch.randn(2, WIDTH), torch.zeros(2, EXPERTS, dtype=torch.bool))
    assert weights.gate_FD is not None
    for weight_FD in (weights.gate_FD, weights.up_FD, weights.down_FD):
        assert_rows_read_once(loads, weight_FD, [])


def test_the_backward_pass_reads_no_other_rows() -> None:
    weights = make("silu")
    x_TD = torch.randn(3, WIDTH, requires_grad=True)
    mask_TE = torch.rand(3, EXPERTS) < 0.3
    y_TD = sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY)
    with count_loads() as loads:
        y_TD.sum().backward()
    rows = listed(neuron_mask(mask_TE, NEURONS))
    assert weights.gate_FD is not None
    for weight_FD in (weights.gate_FD, weights.up_FD, weights.down_FD):
        assert loads.rows_of(weight_FD) == rows
