"""The operator: its autograd formula and its shapes, registered with torch.library.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.plan import plan_forward
from moe_tools.kernels.triton.plan_backward import plan_backward

GRADIENTS = 7
"""How many operands, from the first, `backward` answers with a gradient."""
TENSORS = 11
"""How many operands of `forward` are tensors, from the first."""


@torch.library.custom_op("moe_tools::sparse_ffn_triton", mutates_args=())
def forward(
    x_TD: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor | None,
    down_FD: Tensor,
    mask_TE: Tensor | None,
    gate_F: Tensor | None,
    up_F: Tensor | None,
    down_D: Tensor | None,
    gate_scale_F: Tensor | None,
    up_scale_F: Tensor | None,
    down_scale_F: Tensor | None,
    act: str,
    up_act: str,
    theta: float,
    up_theta: float,
    gate_first: bool,
    atomic: bool,
    config: Sequence[int],
) -> Tensor:
    """y_TD; the operands as `Call` has them."""
    if not len(x_TD):
        return torch.empty_like(x_TD)
    call = Call.of(
        *(x_TD, gate_FD, up_FD, down_FD, mask_TE, gate_F, up_F, down_D),
        *(gate_scale_F, up_scale_F, down_scale_F),
        *(act, up_act, theta, up_theta, gate_first, atomic),
        config=config,
    )
    launches, y_TD = plan_forward(call)
    for launch in launches:
        launch.run()
    return y_TD


@forward.register_fake
def _(x_TD: Tensor, *operands: Any) -> Tensor:
    return torch.empty_like(x_TD)


@torch.library.custom_op("moe_tools::sparse_ffn_triton_backward", mutates_args=())
def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor | None,
    down_FD: Tensor,
    mask_TE: Tensor | None,
    gate_F: Tensor | None,
    up_F: Tensor | None,
    act: str,
    up_act: str,
    theta: float,
    up_theta: float,
    atomic: bool,
    config: Sequence[int],
) -> list[Tensor]:
    """The gradient of each operand, in their order; of size 0 where there is none."""
    operands = (x_TD, gate_FD, up_FD, down_FD, mask_TE, gate_F, up_F)
    if not len(x_TD):
        return [made.zero_() for made in _blank(operands)]
    acts = (act, up_act, theta, up_theta)
    call = Call.of(*operands, *[None] * 4, *acts, False, atomic, config=config)
    launches, made = plan_backward(call, dy_TD.contiguous())
    for launch in launches:
        launch.run()
    return [x_TD.new_empty(0) if one is None else one for one in made]


@backward.register_fake
def _(dy_TD: Tensor, *operands: Any) -> list[Tensor]:
    return _blank(operands[:GRADIENTS])


def _blank(operands: Sequence[Tensor | None]) -> list[Tensor]:
    x_TD = operands[0]
    assert x_TD is not None
    return [
        torch.empty(one.shape, dtype=one.dtype, device=one.device)
        if one is not None and one.dtype.is_floating_point
        else x_TD.new_empty(0)
        for one in operands
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, acts = inputs[: GRADIENTS + 1], inputs[TENSORS:-3]
    ctx.save_for_backward(*tensors)
    ctx.options = (*acts, *inputs[-2:])


def _autograd(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
    *operands, down_D = ctx.saved_tensors
    made = backward(dy_TD, *operands, *ctx.options)
    wanted = ctx.needs_input_grad
    found = [grad if wanted[index] else None for index, grad in enumerate(made)]
    found.append(dy_TD.sum(0).to(down_D.dtype) if wanted[GRADIENTS] else None)
    return (*found, *[None] * (len(wanted) - len(found)))


forward.register_autograd(_autograd, setup_context=_setup_context)
