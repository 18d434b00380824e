"""The operator: its autograd formula and its shapes, registered with torch.library.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.gradients import Gradients
from moe_tools.kernels.triton.launches import backward_launches, forward_launches


def operands_of(operator: Any) -> tuple[str, ...]:
    """The names of an operator's tensors, in the order of its schema; its options are keywords."""
    arguments = operator._opoverload._schema.arguments
    return tuple(one.name for one in arguments if not one.kwarg_only)


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
    *,
    act: str,
    up_act: str,
    threshold: float,
    up_threshold: float,
    gate_first: bool,
    atomic: bool,
    config: Sequence[int],
) -> Tensor:
    """Computes y_TD; the operands are those of `Call`."""
    if not len(x_TD):
        return torch.empty_like(x_TD)
    call = Call(
        x_TD=x_TD,
        gate_FD=gate_FD,
        up_FD=up_FD,
        down_FD=down_FD,
        mask_TE=mask_TE,
        gate_F=gate_F,
        up_F=up_F,
        down_D=down_D,
        gate_scale_F=gate_scale_F,
        up_scale_F=up_scale_F,
        down_scale_F=down_scale_F,
        act=act,
        up_act=up_act,
        threshold=threshold,
        up_threshold=up_threshold,
        gate_first=gate_first,
        atomic=atomic,
        config=Config.from_numbers(config),
    )
    launches, y_TD = forward_launches(call)
    for launch in launches:
        launch.run()
    return y_TD


OPERANDS = operands_of(forward)


@forward.register_fake
def _(x_TD: Tensor, *operands: Any, **options: Any) -> Tensor:
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
    *,
    act: str,
    up_act: str,
    threshold: float,
    up_threshold: float,
    atomic: bool,
    config: Sequence[int],
) -> list[Tensor]:
    """Computes `Gradients`, in the order of their fields; of size 0 where there is none."""
    call = Call(
        x_TD=x_TD,
        gate_FD=gate_FD,
        up_FD=up_FD,
        down_FD=down_FD,
        mask_TE=mask_TE,
        gate_F=gate_F,
        up_F=up_F,
        act=act,
        up_act=up_act,
        threshold=threshold,
        up_threshold=up_threshold,
        atomic=atomic,
        config=Config.from_numbers(config),
    )
    if not len(x_TD):
        return [made.zero_() for made in _listed(Gradients.blank(call))]
    launches, made = backward_launches(call, dy_TD.contiguous())
    for launch in launches:
        launch.run()
    return _listed(made)


@backward.register_fake
def _(dy_TD: Tensor, *operands: Any, **options: Any) -> list[Tensor]:
    _, *names = operands_of(backward)
    return _listed(Gradients.blank(Call(**dict(zip(names, operands, strict=True)))))


def _listed(made: Gradients) -> list[Tensor]:
    """As a schema has them: it knows no list with gaps."""
    return [made.x_TD.new_empty(0) if one is None else one for one in made]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    given = dict(zip(OPERANDS, inputs, strict=True))
    ctx.save_for_backward(*(given[name] for name in Gradients._fields))
    ctx.down_dtype = None if given["down_D"] is None else given["down_D"].dtype
    ctx.options = {k: v for k, v in keyword_only_inputs.items() if k != "gate_first"}


def _autograd(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    saved = dict(zip(Gradients._fields, ctx.saved_tensors, strict=True))
    made = backward(dy_TD=dy_TD, **saved, **ctx.options)
    grads: dict[str, Tensor] = dict(zip(Gradients._fields, made, strict=True))
    if wanted["down_D"]:
        grads["down_D"] = dy_TD.sum(0).to(ctx.down_dtype)
    return tuple(grads[name] if wanted[name] else None for name in OPERANDS)


forward.register_autograd(_autograd, setup_context=_setup_context)
