"""The operator for tokens grouped by expert: its autograd formula and shapes.

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.triton.plan_grouped import (
    GroupedCall,
    plan_grouped,
    plan_grouped_backward,
)

WEIGHTS = 4
"""Operands, from the first, that are computed with; the chosen experts and their weights follow."""


@torch.library.custom_op("moe_tools::grouped_ffn_triton", mutates_args=())
def grouped_forward(
    x_TD: Tensor,
    gate_XND: Tensor,
    up_XND: Tensor,
    down_XND: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    act: str,
    up_act: str,
    theta: float,
    up_theta: float,
    config: Sequence[int],
) -> Tensor:
    """y_TD; the operands as `GroupedCall` has them."""
    operands = (x_TD, gate_XND, up_XND, down_XND, chosen_TK, weight_TK)
    call = GroupedCall.of(*operands, act, up_act, theta, up_theta, config=config)
    launches, y_PD = plan_grouped(call)
    for launch in launches:
        launch.run()
    return _per_token(y_PD, chosen_TK).to(x_TD.dtype)


@grouped_forward.register_fake
def _(x_TD: Tensor, *operands: Any) -> Tensor:
    return torch.empty_like(x_TD)


@torch.library.custom_op("moe_tools::grouped_ffn_triton_backward", mutates_args=())
def grouped_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_XND: Tensor,
    up_XND: Tensor,
    down_XND: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    act: str,
    up_act: str,
    theta: float,
    up_theta: float,
    config: Sequence[int],
) -> list[Tensor]:
    """The gradients of x, gate, up and down, and of the weights of the chosen experts."""
    operands = (x_TD, gate_XND, up_XND, down_XND, chosen_TK, weight_TK)
    call = GroupedCall.of(*operands, act, up_act, theta, up_theta, config=config)
    launches, made = plan_grouped_backward(call, dy_TD.contiguous())
    for launch in launches:
        launch.run()
    dx_TD = _per_token(made.x_PD, chosen_TK).to(x_TD.dtype)
    d_weight_TK = made.weight_PB.sum(1).view(weight_TK.shape).to(weight_TK.dtype)
    return [dx_TD, made.gate_XND, made.up_XND, made.down_XND, d_weight_TK]


@grouped_backward.register_fake
def _(dy_TD: Tensor, *operands: Any) -> list[Tensor]:
    differentiable = (*operands[:WEIGHTS], operands[WEIGHTS + 1])
    return [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in differentiable]


def _per_token(y_PD: Tensor, chosen_TK: Tensor) -> Tensor:
    """A token's pairs added in their order."""
    return y_PD.view(*chosen_TK.shape, -1).sum(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: WEIGHTS + 2])
    ctx.options = inputs[WEIGHTS + 2 :]


def _autograd(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
    *made, d_weight_TK = grouped_backward(dy_TD, *ctx.saved_tensors, *ctx.options)
    grads = [*made, None, d_weight_TK, *[None] * len(ctx.options)]
    return tuple(
        g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=True)
    )


grouped_forward.register_autograd(_autograd, setup_context=_setup_context)
