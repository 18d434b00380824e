"""The operator: checks, the autograd formula and the shapes, registered with torch.library.

Letters: T tokens (in the public function any leading dimensions), D model width, F neurons, E
experts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, get_args

import torch
from torch import Tensor

from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.plan import ZEROING, Act, Call, plan_backward, plan_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_ffn_triton(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    mask_TE: Tensor,
    *,
    gate_FD: Tensor | None = None,
    act: Act,
    threshold: float = 0.0,
    up_bias_F: Tensor | None = None,
    gate_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    gate_first: bool = False,
    atomic: bool = False,
    config: Config | None = None,
) -> Tensor:
    """y_TD = sum over the selected experts of weight * E(x), plus the down bias.

    The contract of `sparse_ffn`: gated h = act(gate x) * up x, plain h = act(up x). `fatrelu` is
    a where a > `threshold`, else 0 (ProSparse, arXiv 2402.13516, eq. 4); `drelu` is relu(gate x) *
    relu(up x) (TurboSparse, arXiv 2406.05955, eq. 3) and needs a gate. Sums are fp32, y has the
    dtype of x. With `gate_first`, the activation is computed first and only neurons where it is
    not zero go on: exact, for relu, fatrelu and drelu.

    Differentiable in x, the weights, the biases and a floating mask. Routing is hard: where the
    mask is zero its gradient is zero, because nothing there is computed.

    With `atomic`, shares of the sum are added as they come: y may differ in the last bit from run
    to run. `config` has tile sizes that `tune` found.

    Raises:
        ValueError: dtypes that differ or are not fp32, bf16 or fp16; a weight whose rows are not
            contiguous; an unknown activation, or one that `gate_first` or a plain FFN cannot
            have; tensors on a CPU outside Triton's interpreter.
    """
    weights = {"up_FD": up_FD, "down_FD": down_FD, "gate_FD": gate_FD}
    _check_tensors(x_TD, weights)
    _check_act(act, threshold, gated=gate_FD is not None, gate_first=gate_first)
    rows = (up_FD, None) if gate_FD is None else (gate_FD, up_FD)
    biases = (up_bias_F, None) if gate_FD is None else (gate_bias_F, up_bias_F)
    y_TD: Tensor = _forward(
        x_TD.reshape(-1, x_TD.shape[-1]).contiguous(),
        *rows,
        down_FD,
        mask_TE.reshape(-1, mask_TE.shape[-1]).contiguous(),
        *biases,
        down_bias_D,
        act,
        threshold,
        gate_first,
        atomic,
        [] if config is None else list(astuple(config)),
    )
    return y_TD.view(x_TD.shape)


def _check_tensors(x_TD: Tensor, weights: dict[str, Tensor | None]) -> None:
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.dtype != x_TD.dtype or x_TD.dtype not in DTYPES:
            raise ValueError(
                f"x is {x_TD.dtype}, {name} is {weight.dtype}; "
                "the triton backend takes float32, bfloat16 or float16, the same for all"
            )
        if weight.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {weight.stride()}; the row of a neuron must be contiguous: "
                f"pack it once, with {name}.contiguous()"
            )
    if x_TD.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "the triton backend runs on a GPU, and x is on the CPU; "
            "TRITON_INTERPRET=1, set before the first import, interprets it there, slowly"
        )


def _check_act(act: str, threshold: float, *, gated: bool, gate_first: bool) -> None:
    if act not in get_args(Act):
        raise ValueError(f"unknown act {act!r}; the triton backend has {', '.join(get_args(Act))}")
    if act == "drelu" and not gated:
        raise ValueError("act 'drelu' is relu(gate x) * relu(up x): it needs gate_FD")
    if gate_first and act not in ZEROING:
        raise ValueError(f"act {act!r} is hardly ever zero; gate_first wants {', '.join(ZEROING)}")
    if threshold < 0 or (threshold and act != "fatrelu"):
        raise ValueError(f"threshold {threshold} with act {act!r}: only fatrelu has one, >= 0")


@torch.library.custom_op("moe_tools::sparse_ffn_triton", mutates_args=())
def _forward(
    x_TD: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor | None,
    down_FD: Tensor,
    mask_TE: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    down_bias_D: Tensor | None,
    act: str,
    threshold: float,
    gate_first: bool,
    atomic: bool,
    config: Sequence[int],
) -> Tensor:
    if not len(x_TD):
        return torch.empty_like(x_TD)
    launches, y_TD = plan_forward(
        Call(
            *(x_TD, gate_FD, up_FD, down_FD, mask_TE),
            *(act, threshold, gate_bias_F, up_bias_F, down_bias_D),  # type: ignore[arg-type]
            *(gate_first, atomic, Config(*config) if config else None),
        )
    )
    for launch in launches:
        launch.run()
    return y_TD


@_forward.register_fake
def _(x_TD: Tensor, *operands: Any) -> Tensor:
    return torch.empty_like(x_TD)


@torch.library.custom_op("moe_tools::sparse_ffn_triton_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor | None,
    down_FD: Tensor,
    mask_TE: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    act: str,
    threshold: float,
    atomic: bool,
    config: Sequence[int],
) -> list[Tensor]:
    """Gradients of x, the weights, the mask and two biases; one of size 0 where there is none."""
    operands = (x_TD, gate_FD, up_FD, down_FD, mask_TE, gate_bias_F, up_bias_F)
    if not len(x_TD):
        return [made.zero_() for made in _blank(*operands)]
    call = Call(
        *(x_TD, gate_FD, up_FD, down_FD, mask_TE),
        *(act, threshold, gate_bias_F, up_bias_F, None),  # type: ignore[arg-type]
        *(False, atomic, Config(*config) if config else None),
    )
    launches, made = plan_backward(call, dy_TD.contiguous())
    for launch in launches:
        launch.run()
    found = (
        *(made.x_TD, made.gate_FD, made.up_FD, made.down_FD),
        *(made.mask_TE, made.gate_bias_F, made.up_bias_F),
    )
    return [x_TD.new_empty(0) if one is None else one for one in found]


@_backward.register_fake
def _(dy_TD: Tensor, *operands: Any) -> list[Tensor]:
    return _blank(*operands[:7])


def _blank(*operands: Tensor | None) -> list[Tensor]:
    def blank(like: Tensor | None) -> Tensor:
        if like is None or not like.dtype.is_floating_point:
            return operands[0].new_empty(0)  # type: ignore[union-attr]
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    return [blank(like) for like in operands]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, act, threshold, _, atomic, config = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (act, threshold, atomic, config)


def _autograd(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
    *operands, down_bias_D = ctx.saved_tensors
    made = _backward(dy_TD, *operands, *ctx.options)
    wanted = ctx.needs_input_grad
    found = [grad if wants else None for grad, wants in zip(made, wanted, strict=False)]
    d_bias_D = dy_TD.sum(0).to(down_bias_D.dtype) if wanted[7] else None
    return *found, d_bias_D, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
