"""The operator: its autograd formula and its shapes, registered with torch.library.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.scores import Scores
from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.gradients import Gradients
from moe_tools.kernels.triton.kernel_launch import KernelLaunch
from moe_tools.kernels.triton.launches import backward_launches, forward_launches


def operands_of(operator: Any) -> tuple[str, ...]:
    """The names of an operator's tensors, in the order of its schema; its options are keywords."""
    arguments = operator._opoverload._schema.arguments
    return tuple(one.name for one in arguments if not one.kwarg_only)


def run(launches: Sequence[KernelLaunch], x_TD: Tensor) -> None:
    """Puts launches on the stream of the device that has x, whichever is the current one."""
    with _on_device_of(x_TD):
        for launch in launches:
            launch.run()


def _on_device_of(x_TD: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device_of(x_TD) if x_TD.is_cuda else nullcontext()


FFN = (
    "Tensor x_TD, Tensor gate_FD, Tensor? up_FD, Tensor down_FD, Tensor? mask_TE, "
    "Tensor? gate_F, Tensor? up_F, Tensor? down_D, "
    "Tensor? gate_scale_FG, Tensor? up_scale_FG, Tensor? down_scale_FG, "
    "Tensor? off_F, Tensor? residual_TD"
)
"""The tensors of a `Call`, as a schema has them."""
OPTIONS = "str act, str up_act, float threshold, float up_threshold, int[] config"
"""The options that every operator takes."""


def call_of(operands: Mapping[str, Tensor | None], options: Mapping[str, Any]) -> Call:
    """The call of an operator's tensors and options, by name."""
    return Call(**{**operands, **options, "config": Config.from_numbers(options["config"])})


def like_x(x_TD: Tensor, *_: Any, **__: Any) -> Tensor:
    """What an operator returns, without data."""
    return torch.empty_like(x_TD)


def compute(
    operands: Sequence[Tensor | None], options: Mapping[str, Any], scores: Scores | None = None
) -> Tensor:
    """Computes y_TD; the operands are those of `FFN`, and `scores` stand in place of a mask."""
    call = call_of(dict(zip(OPERANDS, operands, strict=True)), options)
    if not len(call.x_TD):
        return torch.empty_like(call.x_TD)
    launches, y_TD = forward_launches(call, scores)
    run(launches, call.x_TD)
    return y_TD


def _forward(*operands: Tensor | None, **options: Any) -> Tensor:
    """Computes y_TD; the operands are those of `Call`."""
    return compute(operands, options)


forward = torch.library.custom_op(
    "moe_tools::sparse_ffn_triton",
    _forward,
    mutates_args=(),
    schema=f"({FFN}, *, {OPTIONS}, bool gate_first, bool atomic) -> Tensor",
)
forward.register_fake(like_x)
OPERANDS = operands_of(forward)


def _backward(dy_TD: Tensor, *operands: Tensor | None, **options: Any) -> list[Tensor]:
    """Computes `Gradients`, in the order of their fields; of size 0 where there is none."""
    call = call_of(dict(zip(SAVED, operands, strict=True)), options)
    if not len(dy_TD):
        return [made.zero_() for made in _listed(Gradients.blank(call))]
    launches, made = backward_launches(call, dy_TD.contiguous())
    run(launches, call.x_TD)
    return _listed(made)


SAVED = (*Gradients._fields, "off_F")
"""What the backward pass takes: h is computed again."""
backward = torch.library.custom_op(
    "moe_tools::sparse_ffn_triton_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy_TD, Tensor x_TD, Tensor gate_FD, Tensor? up_FD, Tensor down_FD, "
    "Tensor? mask_TE, Tensor? gate_F, Tensor? up_F, Tensor? off_F, "
    f"*, {OPTIONS}, bool atomic) -> Tensor[]",
)


@backward.register_fake
def _(dy_TD: Tensor, *operands: Any, **options: Any) -> list[Tensor]:
    return _listed(Gradients.blank(call_of(dict(zip(SAVED, operands, strict=True)), options)))


def _listed(made: Gradients) -> list[Tensor]:
    """As a schema has them: it knows no list with gaps."""
    return [made.x_TD.new_empty(0) if one is None else one for one in made]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    given = dict(zip(OPERANDS, inputs, strict=True))
    ctx.save_for_backward(*(given[name] for name in SAVED))
    ctx.down_dtype = None if given["down_D"] is None else given["down_D"].dtype
    ctx.options = {k: v for k, v in keyword_only_inputs.items() if k != "gate_first"}


def _autograd(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    made = backward(dy_TD, *ctx.saved_tensors, **ctx.options)
    grads: dict[str, Tensor] = dict(zip(Gradients._fields, made, strict=True))
    if wanted["down_D"]:
        grads["down_D"] = dy_TD.sum(0).to(ctx.down_dtype)
    if wanted["residual_TD"]:
        grads["residual_TD"] = dy_TD
    return tuple(grads[name] if wanted[name] else None for name in OPERANDS)


forward.register_autograd(_autograd, setup_context=_setup_context)
