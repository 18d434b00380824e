"""What is off stays out of the sums, whatever its value; elsewhere the mask is a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.cpu.dense import dense_ffn
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.moe import ExpertWeights, moe_ffn
from moe_tools.kernels.packed import ReferenceFFN
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights

Run = Callable[[FFNWeights, Tensor, Tensor], Tensor]
WAYS: dict[str, Run] = {
    "reference": sparse_ffn_reference,
    "packed reference": lambda weights, *call: ReferenceFFN(weights)(*call),
    "dense": dense_ffn,
    "native": lambda weights, *call: CpuFFN(weights, torch.float32)(*call),
}
every_way = pytest.mark.parametrize("way", WAYS)
VALUES = [float("inf"), -float("inf"), float("nan")]


def make(neurons: int = 7, **more: Any) -> FFNWeights:
    """Identity activations: a bias of infinity makes h infinite, and the weights stay finite."""
    up_FD, down_FD, gate_FD = torch.randn(3, neurons, 5)
    return FFNWeights(up_FD, down_FD, "identity", gate_FD, up_F=torch.zeros(neurons), **more)


@every_way
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("off", [False, True], ids=["zero", "off_F"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_an_infinite_h_that_is_off_does_not_count(
    way: str, value: float, off: bool, kind: torch.dtype
) -> None:
    """Seven neurons are three experts, of three, two and two."""
    weights = make(off_F=torch.randn(7) if off else None)
    x_TD = torch.randn(4, 5)
    mask_TE = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).to(kind)
    expected_TD = WAYS[way](weights, x_TD, mask_TE)
    assert weights.up_F is not None
    weights.up_F[3:5] = value  # of the expert that no token has on
    assert torch.equal(WAYS[way](weights, x_TD, mask_TE), expected_TD)


@every_way
@pytest.mark.parametrize("off", [False, True], ids=["zero", "off_F"])
def test_an_infinite_h_that_is_on_counts(way: str, off: bool) -> None:
    weights = make(off_F=torch.randn(7) if off else None)
    weights.down_FD.abs_()
    assert weights.up_F is not None and weights.gate_FD is not None
    weights.up_F[0] = float("inf")
    x_TD = weights.gate_FD[:1]  # gate of the first neuron is above 0
    y_TD = WAYS[way](weights, x_TD, torch.tensor([[True, False, False]]))
    assert torch.equal(y_TD, torch.full((1, 5), float("inf")))


@pytest.mark.parametrize("kind", [torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("off", [False, True], ids=["zero", "off_F"])
def test_what_is_off_has_no_gradient_whatever_its_value(kind: torch.dtype, off: bool) -> None:
    """Not even 0 * infinity: of the weights, biases and x."""
    weights = make(off_F=torch.randn(7) if off else None).changed(Tensor.double, Tensor.double)
    x_TD = torch.randn(4, 5, dtype=torch.float64)
    mask_TE = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).to(kind)

    def gradients(up_F: Tensor) -> list[Tensor]:
        operands = [weights.up_FD, weights.down_FD, weights.gate_FD, up_F, x_TD]
        leaves = [one.detach().clone().requires_grad_() for one in operands if one is not None]
        up_FD, down_FD, gate_FD, bias_F, x = leaves
        own = FFNWeights(up_FD, down_FD, "identity", gate_FD, up_F=bias_F, off_F=weights.off_F)
        sparse_ffn_reference(own, x, mask_TE).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    up_F = torch.zeros(7, dtype=torch.float64)
    expected = gradients(up_F)
    assert len(expected) == 5
    for value in VALUES:
        up_F[3:5] = value
        for ours, theirs in zip(gradients(up_F), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("off", [False, True], ids=["zero", "off_F"])
def test_a_floating_mask_has_the_gradient_of_a_factor_at_zero_too(off: bool) -> None:
    weights = make(off_F=torch.randn(7) if off else None).changed(Tensor.double, Tensor.double)
    x_TD = torch.randn(4, 5, dtype=torch.float64)
    mask_TE = torch.tensor([[1.0, 0, 0.3], [0, 0, 2], [1, 0, 0], [0, 0, -1]], dtype=torch.float64)
    mask_TE.requires_grad_()

    def function(mask_TE: Tensor) -> Tensor:
        return sparse_ffn_reference(weights, x_TD, mask_TE)

    assert torch.autograd.gradcheck(function, (mask_TE,))


def test_where_h_is_infinite_and_off_the_mask_has_the_gradient_of_the_other_neurons() -> None:
    weights = make().changed(Tensor.double, Tensor.double)
    x_TD = torch.randn(1, 5, dtype=torch.float64)
    assert weights.up_F is not None and weights.gate_FD is not None
    weights.up_F[3] = float("inf")
    mask_TE = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    y_TD = sparse_ffn_reference(weights, x_TD, mask_TE)
    (grad_TE,) = torch.autograd.grad(y_TD.sum(), mask_TE)
    h = (x_TD @ weights.gate_FD[4]) * (x_TD @ weights.up_FD[4])  # the other of the second expert
    torch.testing.assert_close(grad_TE[0, 1], (h * weights.down_FD[4].sum())[0])


def test_a_chosen_expert_of_weight_zero_adds_nothing_even_if_it_is_infinite() -> None:
    gate_XND, up_XND, down_XND = torch.randn(3, 2, 4, 5)
    up_XND[1] = float("inf")
    experts = ExpertWeights(gate_XND, up_XND, down_XND, "silu")
    x_TD, chosen_TK = torch.randn(3, 5), torch.tensor([[0, 1]]).expand(3, 2)
    weight_TK = torch.tensor([[0.7, 0.0]]).expand(3, 2)
    y_TD = moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="reference")
    alone_TD = moe_ffn(experts, x_TD, chosen_TK[:, :1], weight_TK[:, :1], backend="reference")
    assert torch.equal(y_TD, alone_TD)
