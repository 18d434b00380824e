"""The operator for tokens grouped by expert: its autograd formula and shapes.

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token, P
pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.grouped_call import GroupedCall
from moe_tools.kernels.triton.launches import grouped_backward_launches, grouped_launches
from moe_tools.kernels.triton.op import operands_of, run

GRADIENTS = ("x_TD", "gate_XND", "up_XND", "down_XND", "weight_TK")
"""The operands that have a gradient, in the order in which the backward operator returns them."""


@torch.library.custom_op("moe_tools::grouped_ffn_triton", mutates_args=())
def grouped_forward(
    x_TD: Tensor,
    gate_XND: Tensor,
    up_XND: Tensor,
    down_XND: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    *,
    act: str,
    up_act: str,
    threshold: float,
    up_threshold: float,
    config: Sequence[int],
) -> Tensor:
    """Computes y_TD; the operands are those of `GroupedCall`."""
    call = GroupedCall(
        x_TD=x_TD,
        gate_XND=gate_XND,
        up_XND=up_XND,
        down_XND=down_XND,
        chosen_TK=chosen_TK,
        weight_TK=weight_TK,
        act=act,
        up_act=up_act,
        threshold=threshold,
        up_threshold=up_threshold,
        config=Config.from_numbers(config),
    )
    launches, y_PD = grouped_launches(call)
    run(launches, x_TD)
    return _per_token(y_PD, chosen_TK).to(x_TD.dtype)


OPERANDS = operands_of(grouped_forward)


@grouped_forward.register_fake
def _(x_TD: Tensor, *operands: Any, **options: Any) -> Tensor:
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
    *,
    act: str,
    up_act: str,
    threshold: float,
    up_threshold: float,
    config: Sequence[int],
) -> list[Tensor]:
    """Computes the gradients of the operands that `GRADIENTS` names, in that order."""
    call = GroupedCall(
        x_TD=x_TD,
        gate_XND=gate_XND,
        up_XND=up_XND,
        down_XND=down_XND,
        chosen_TK=chosen_TK,
        weight_TK=weight_TK,
        act=act,
        up_act=up_act,
        threshold=threshold,
        up_threshold=up_threshold,
        config=Config.from_numbers(config),
    )
    launches, made = grouped_backward_launches(call, dy_TD.contiguous())
    run(launches, x_TD)
    grads = {
        "x_TD": _per_token(made.x_PD, chosen_TK).to(x_TD.dtype),
        "gate_XND": made.gate_XND,
        "up_XND": made.up_XND,
        "down_XND": made.down_XND,
        "weight_TK": made.weight_PB.sum(1).view(weight_TK.shape).to(weight_TK.dtype),
    }
    return [grads[name] for name in GRADIENTS]


@grouped_backward.register_fake
def _(dy_TD: Tensor, *operands: Tensor, **options: Any) -> list[Tensor]:
    _, *names = operands_of(grouped_backward)
    given = dict(zip(names, operands, strict=True))
    likes = [given[name] for name in GRADIENTS]
    return [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in likes]


def _per_token(y_PD: Tensor, chosen_TK: Tensor) -> Tensor:
    """Adds the pairs of each token in their order."""
    return y_PD.view(*chosen_TK.shape, -1).sum(1)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _autograd(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    saved = dict(zip(OPERANDS, ctx.saved_tensors, strict=True))
    made = grouped_backward(dy_TD=dy_TD, **saved, **ctx.options)
    grads: dict[str, Tensor] = dict(zip(GRADIENTS, made, strict=True))
    return tuple(grads[name] if wanted[name] else None for name in OPERANDS)


grouped_forward.register_autograd(_autograd, setup_context=_setup_context)
