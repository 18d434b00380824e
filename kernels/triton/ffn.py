"""`sparse_ffn` on the Triton kernels: checks, then the operator.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS, Act
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import quantize_rows
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x and of weights; weights may be int8, too, with one scale a row."""


class Scales(NamedTuple):
    """Of int8 weights: a row stands for its numbers times its scale."""

    up_F: Tensor
    down_F: Tensor
    gate_F: Tensor | None = None


def sparse_ffn_triton(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None = None,
    *,
    scales: Scales | None = None,
    gate_first: bool | None = None,
    atomic: bool = False,
    config: Config | None = None,
) -> Tensor:
    """y_TD as `sparse_ffn` defines it. Sums are in fp32, y has the dtype of x.

    Differentiable in x, the weights, the biases and a floating mask. Routing is hard: what the
    mask switches off is not computed, so where the mask is zero its gradient is zero.

    Args:
        weights: as they are, not copied; on the device of x.
        x_TD: any leading dimensions.
        mask_TE: which experts run, or with which weight; None is all of them.
        scales: of int8 weights, which have no gradients.
        gate_first: compute the activation of every selected neuron first and go on with those
            where it is not zero (exact). By default, where the activation can be zero. Otherwise
            gate and up are computed together. With a mask of neurons, it is whether a predicted
            list is checked again.
        atomic: add the shares of each sum as they come; y may then differ in the last bit from
            run to run.
        config: tile sizes, of `tune`; by default pinned ones.

    Raises:
        ValueError: what `unsupported` says; shapes that do not fit.
    """
    weights.check_call(x_TD, mask_TE)
    refusal = unsupported(weights, x_TD, gate_first, scales)
    if refusal:
        raise ValueError(refusal)
    (first_FD, first_F, act), *second = _inputs(weights)
    up_FD, up_F, up_act = second[0] if second else (None, None, Act("identity"))
    y_TD: Tensor = forward(
        x_TD.reshape(-1, weights.width).contiguous(),
        *(first_FD, up_FD, weights.down_FD),
        None if mask_TE is None else mask_TE.reshape(-1, mask_TE.shape[-1]).contiguous(),
        *map(_contiguous, (first_F, up_F, weights.down_D)),
        *_scales(scales),
        *(act.name, up_act.name, act.threshold, up_act.threshold),
        act.name in GIVES_ZEROS if gate_first is None else gate_first,
        atomic,
        [] if config is None else list(astuple(config)),
    )
    return y_TD.view(x_TD.shape)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """A bias or scales as the kernels read them: number after number. Copies a view alone."""
    return None if vector is None else vector.contiguous()


def _scales(scales: Scales | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the operator has them: the one projection of a plain FFN stands in gate."""
    if scales is None:
        return None, None, None
    up_F, down_F, gate_F = map(_contiguous, scales)
    return (up_F, None, down_F) if gate_F is None else (gate_F, up_F, down_F)


def unsupported(
    weights: FFNWeights,
    x_TD: Tensor,
    gate_first: bool | None = None,
    scales: Scales | None = None,
) -> str | None:
    """Why these kernels cannot run this; None when they can."""
    rows = {"up_FD": weights.up_FD, "down_FD": weights.down_FD, "gate_FD": weights.gate_FD}
    for name, weight in rows.items():
        if weight is None:
            continue
        wanted = x_TD.dtype if scales is None else torch.int8
        if weight.dtype != wanted or x_TD.dtype not in DTYPES:
            return (
                f"x_TD is {x_TD.dtype} and {name} {weight.dtype}: backend 'triton' takes fp32, "
                "bf16 or fp16, one for all, and int8 weights with `scales`"
            )
        if weight.shape[1] > 1 and weight.stride(1) != 1:
            return (
                f"{name} has strides {weight.stride()}: backend 'triton' reads a neuron as one "
                f"contiguous row; store {name}.contiguous() once, or `pack`"
            )
    acts = [act for _, _, act in weights.inputs]
    if not all(isinstance(act, Act) for act in acts):
        return "backend 'triton' knows activations by name: give a name or an Act, not a function"
    if gate_first and _inputs(weights)[0][2].name not in GIVES_ZEROS:
        return f"gate_first needs an activation that can be zero: {', '.join(GIVES_ZEROS)}"
    if scales is not None and x_TD.requires_grad and torch.is_grad_enabled():
        return "int8 weights have no gradients: call under torch.no_grad()"
    return no_device(x_TD)


def no_device(x_TD: Tensor) -> str | None:
    """Why nothing here runs the kernels on this tensor; None when something does."""
    if x_TD.device.type == "cpu" and not triton.knobs.runtime.interpret:
        return (
            "backend 'triton' runs on a GPU and x_TD is on the CPU; TRITON_INTERPRET=1, set "
            "before the first import, interprets the kernels there, slowly"
        )
    return None


def _inputs(weights: FFNWeights) -> list[tuple[Tensor, Tensor | None, Act]]:
    return [(rows, bias, act) for rows, bias, act in weights.inputs if isinstance(act, Act)]


class TritonFFN(PackedFFN):
    """Copies of the weights, each row contiguous; in int8 with one scale a row.

    Raises:
        ValueError: a dtype that the kernels do not read.
    """

    backend = "triton"

    def __init__(self, weights: FFNWeights, dtype: torch.dtype) -> None:
        if dtype not in (*DTYPES, torch.int8):
            raise ValueError(f"backend 'triton' stores fp32, bf16, fp16 and int8, not {dtype}")
        kept = weights.up_FD.dtype if dtype == torch.int8 else dtype
        scales_F: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(kept, copy=True, memory_format=torch.contiguous_format)

        def quantize(weight_FD: Tensor) -> Tensor:
            rows_FD, scale_F = quantize_rows(weight_FD.detach())
            scales_F.append(scale_F)
            return rows_FD.contiguous()

        super().__init__(weights.changed(quantize if dtype == torch.int8 else copy, copy))
        self.scales = Scales(*scales_F) if scales_F else None

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        with torch.no_grad():
            return sparse_ffn_triton(self.weights, x_TD, mask_TE, scales=self.scales)
