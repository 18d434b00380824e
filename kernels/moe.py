"""Runs the experts of one layer of an MoE host: each token goes through those its router chose.

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_tools.kernels.activations import ActivationLike
from moe_tools.kernels.reference import sparse_ffn_reference, weighed
from moe_tools.kernels.sparse_ffn import left_to_pytorch, on_gpu, triton_kernels
from moe_tools.kernels.weights import FFNWeights

Backend = Literal["auto", "triton", "reference"]


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of X gated FFNs of N neurons each, a neuron a row, without biases.

    Raises:
        ValueError: shapes that differ.
    """

    gate_XND: Tensor
    up_XND: Tensor
    down_XND: Tensor
    """W_down of each expert transposed; Triton copies it where its rows are not contiguous."""
    act: ActivationLike
    up_act: ActivationLike = "identity"

    def __post_init__(self) -> None:
        shapes = {tuple(one.shape) for one in (self.gate_XND, self.up_XND, self.down_XND)}
        if len(shapes) != 1 or self.gate_XND.ndim != 3:
            raise ValueError(
                f"weights of shapes {sorted(shapes)}: all are (experts, neurons, width)"
            )

    def of(self, expert: int) -> FFNWeights:
        """The weights of one expert."""
        return FFNWeights(
            self.up_XND[expert],
            self.down_XND[expert],
            self.act,
            self.gate_XND[expert],
            up_act=self.up_act,
        )


def moe_ffn(
    experts: ExpertWeights,
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Returns y_TD: for each token the weighted sum of the outputs of its chosen experts.

    An expert whose weight is exactly 0 adds nothing, whatever its output. Differentiable in x, the
    weights of the experts and `weight_TK`.

    Args:
        experts: of one layer.
        x_TD: two dimensions.
        chosen_TK: which experts; no token chooses one twice.
        weight_TK: what their outputs are multiplied with.
        backend: auto is triton on a GPU, where Triton is installed and can run these, and otherwise
            the reference: expert by expert, which asks the device which experts were chosen.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or one that cannot run this.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(get_args(Backend))}")
    _check(experts, x_TD, chosen_TK, weight_TK)
    if backend == "triton" or (backend == "auto" and on_gpu(x_TD)):
        kernels, routing = triton_kernels("moe"), (chosen_TK, weight_TK)
        why_not = kernels.unsupported(experts, x_TD, *routing) if backend == "auto" else None
        if why_not is None:
            y_TD: Tensor = kernels.moe_ffn_triton(experts, x_TD, *routing)
            return y_TD
        left_to_pytorch(why_not)
    return _reference(experts, x_TD, chosen_TK, weight_TK)


def _check(experts: ExpertWeights, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> None:
    width = experts.gate_XND.shape[-1]
    if x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ValueError(f"x_TD is {tuple(x_TD.shape)}; the experts have width {width}")
    if chosen_TK.shape != weight_TK.shape or chosen_TK.shape[:1] != x_TD.shape[:1]:
        raise ValueError(
            f"chosen_TK is {tuple(chosen_TK.shape)} and weight_TK {tuple(weight_TK.shape)}, for "
            f"{len(x_TD)} tokens: one row a token in both"
        )


def _reference(
    experts: ExpertWeights, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Defines the result: expert by expert, each with the tokens that chose it."""
    y_TD = torch.zeros_like(x_TD)
    for index in chosen_TK.unique().tolist():
        place, token = torch.where((chosen_TK == index).T)
        out_TD = sparse_ffn_reference(experts.of(index), x_TD[token], None)
        out_TD = weighed(out_TD, weight_TK[token, place, None])
        y_TD = y_TD.index_add(0, token, out_TD.to(y_TD.dtype))
    return y_TD
