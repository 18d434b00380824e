"""`sparse_ffn` on the Triton kernels: checks, then the operator.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS, Act, ActivationLike, named
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import quantize_rows
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What x and the weights may be; weights may be int8, too, with one scale a row."""

UNNAMED = "backend 'triton' knows activations by name: give a name or an Act, not a function"


class Scales(NamedTuple):
    """The scales of int8 weights: a row stands for its numbers times its scale."""

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
    """Computes y_TD as `sparse_ffn` defines it. Sums are in fp32, y has the dtype of x.

    Differentiable in x, the weights, the biases and a floating mask. Routing is hard: what the
    mask switches off is not computed, so where the mask is zero its gradient is zero.

    Args:
        weights: as they are, not copied; on the device of x. A bias that is a view is copied.
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
    refusal = unsupported(weights, x_TD, mask_TE, gate_first=gate_first, scales=scales)
    if refusal:
        raise ValueError(refusal)
    activations = activation_options(weights.act, weights.up_act)
    y_TD: Tensor = forward(
        x_TD=x_TD.reshape(-1, weights.width).contiguous(),
        mask_TE=None if mask_TE is None else mask_TE.reshape(-1, mask_TE.shape[-1]).contiguous(),
        **_projections(weights),
        **_scales(weights, scales),
        **activations,
        gate_first=activations["act"] in GIVES_ZEROS if gate_first is None else gate_first,
        atomic=atomic,
        config=[] if config is None else config.numbers,
    )
    return y_TD.view(x_TD.shape)


def activation_options(act: ActivationLike, up_act: ActivationLike) -> dict[str, Any]:
    """Two activations as the options of an operator."""
    act, up_act = named(act), named(up_act)
    assert isinstance(act, Act) and isinstance(up_act, Act)
    return {
        "act": act.name,
        "up_act": up_act.name,
        "threshold": act.threshold,
        "up_threshold": up_act.threshold,
    }


def _projections(weights: FFNWeights) -> dict[str, Tensor | None]:
    """Rows and biases by the operator's names: a plain FFN's one projection stands in gate."""
    up_F, gate_F = _contiguous(weights.up_F), _contiguous(weights.gate_F)
    down = {"down_FD": weights.down_FD, "down_D": _contiguous(weights.down_D)}
    if weights.gate_FD is None:
        return {"gate_FD": weights.up_FD, "gate_F": up_F, "up_FD": None, "up_F": None, **down}
    gate = {"gate_FD": weights.gate_FD, "gate_F": gate_F}
    return {**gate, "up_FD": weights.up_FD, "up_F": up_F, **down}


def _scales(weights: FFNWeights, scales: Scales | None) -> dict[str, Tensor | None]:
    """The scales by the operator's names, in the places of their projections."""
    up_F, down_F, gate_F = (None, None, None) if scales is None else map(_contiguous, scales)
    if weights.gate_FD is None:
        up_F, gate_F = None, up_F
    return {"gate_scale_F": gate_F, "up_scale_F": up_F, "down_scale_F": down_F}


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """Copies a view into a vector whose numbers follow each other, as the kernels read them."""
    return None if vector is None else vector.contiguous()


def unsupported(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None = None,
    *,
    gate_first: bool | None = None,
    scales: Scales | None = None,
) -> str | None:
    """Says why these kernels cannot run this; None when they can."""
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
    act = named(weights.act)
    if not (isinstance(act, Act) and isinstance(named(weights.up_act), Act)):
        return UNNAMED
    if gate_first and act.name not in GIVES_ZEROS:
        return f"gate_first needs an activation that can be zero: {', '.join(GIVES_ZEROS)}"
    if scales is not None and torch.is_grad_enabled():
        others = (x_TD, mask_TE, *scales)
        if weights.requires_grad or any(one is not None and one.requires_grad for one in others):
            return "int8 weights have no gradients: call under torch.no_grad()"
    return no_device(x_TD)


def no_device(x_TD: Tensor) -> str | None:
    """Says why nothing here runs the kernels on this tensor; None when something does."""
    if x_TD.device.type == "cpu" and not triton.knobs.runtime.interpret:
        return (
            "backend 'triton' runs on a GPU and x_TD is on the CPU; TRITON_INTERPRET=1, set "
            "before the first import, interprets the kernels there, slowly"
        )
    return None


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
