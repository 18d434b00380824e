"""`sparse_ffn` on the Triton kernels: checks, then the operator.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS, Act, ActivationLike, named
from moe_tools.kernels.triton.call import SCALES
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What x and the weights may be; packed weights may be int8 and int4, too (`packed.TritonFFN`)."""

UNNAMED = "backend 'triton' knows activations by name: give a name or an Act, not a function"


def sparse_ffn_triton(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None = None,
    *,
    gate_first: bool | None = None,
    atomic: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Computes y_TD as `sparse_ffn` defines it. Sums are in fp32, y has the dtype of x.

    Differentiable in x, the weights, the biases and a floating mask. Routing is hard: what the
    mask switches off is not computed, so where the mask is zero its gradient is zero.

    Args:
        weights: as they are, not copied; on the device of x. A bias that is a view is copied. With
            `off_F`, each call reads all of W_down once, for the constant that it makes.
        x_TD: any leading dimensions.
        mask_TE: which experts run, or with which weight; None is all of them.
        gate_first: compute the activation of every selected neuron first and go on with those
            where it is not zero (exact). By default, where the activation can be zero and what is
            off adds nothing. Otherwise gate and up are computed together. With a mask of neurons,
            it is whether a predicted list is checked again.
        atomic: add the shares of each sum as they come; y may then differ in the last bit from
            run to run.
        config: tile sizes, of `tune`; by default pinned ones.

    Raises:
        ValueError: what `unsupported` says; shapes that do not fit.
    """
    weights.check_call(x_TD, mask_TE)
    refusal = unsupported(weights, x_TD, mask_TE, gate_first=gate_first)
    if refusal:
        raise ValueError(refusal)
    y_TD: Tensor = forward(
        flat(x_TD),
        mask_TE=None if mask_TE is None else flat(mask_TE),
        **operands(weights.changed(lambda rows: rows, Tensor.contiguous)),
        **dict.fromkeys(SCALES),
        residual_TD=None,
        **activation_options(weights.act, weights.up_act),
        gate_first=goes_gate_first(weights) if gate_first is None else gate_first,
        atomic=atomic,
        config=[] if config is None else config.numbers,
    )
    return y_TD.view(x_TD.shape)


def flat(values: Tensor) -> Tensor:
    """Two dimensions, whose rows follow each other, as the kernels read x, masks and the like."""
    return values.reshape(-1, values.shape[-1]).contiguous()


def goes_gate_first(weights: FFNWeights) -> bool:
    """Whether a zero of the activation says that a neuron adds nothing."""
    act = named(weights.act)
    return weights.off_F is None and isinstance(act, Act) and act.name in GIVES_ZEROS


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


def operands(weights: FFNWeights) -> dict[str, Tensor | None]:
    """Rows, biases and constants by the operator's names: a plain FFN's one projection is `gate`.

    What is off adds `off_F` times its rows. The kernels add that for every neuron, as a part of the
    bias, and subtract off_F from h of those that run.
    """
    down = {"down_FD": weights.down_FD, "down_D": constant_D(weights), "off_F": weights.off_F}
    if weights.gate_FD is None:
        up = {"gate_FD": weights.up_FD, "gate_F": weights.up_F, "up_FD": None, "up_F": None}
        return {**up, **down}
    gate = {"gate_FD": weights.gate_FD, "gate_F": weights.gate_F}
    return {**gate, "up_FD": weights.up_FD, "up_F": weights.up_F, **down}


def constant_D(weights: FFNWeights) -> Tensor | None:
    """What is added to y of every token: the bias, and what all neurons add when they are off."""
    if weights.off_F is None:
        return weights.down_D
    off_D = weights.off_F.float() @ weights.down_FD.float()
    return off_D if weights.down_D is None else off_D + weights.down_D.float()


def unsupported(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None = None,
    *,
    gate_first: bool | None = None,
) -> str | None:
    """Says why these kernels cannot run this; None when they can."""
    rows = {"up_FD": weights.up_FD, "down_FD": weights.down_FD, "gate_FD": weights.gate_FD}
    for name, weight in rows.items():
        if weight is None:
            continue
        if weight.dtype != x_TD.dtype or x_TD.dtype not in DTYPES:
            return (
                f"x_TD is {x_TD.dtype} and {name} {weight.dtype}: backend 'triton' takes fp32, "
                "bf16 or fp16, one for all; `pack` stores int8 and int4"
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
    if gate_first and weights.off_F is not None:
        return "gate_first leaves out what is zero, and with off_F that is not what is off"
    biases = {"gate_F": weights.gate_F, "up_F": weights.up_F, "down_D": weights.down_D}
    others = {**rows, **biases, "off_F": weights.off_F, "mask_TE": mask_TE}
    return elsewhere(x_TD, others) or no_device(x_TD)


def elsewhere(x_TD: Tensor, others: Mapping[str, Tensor | None]) -> str | None:
    """Says which tensor is on another device than x; None: none is."""
    for name, other in others.items():
        if other is not None and other.device != x_TD.device:
            return (
                f"x_TD is on {x_TD.device} and {name} on {other.device}: backend 'triton' wants "
                "all of a call on one device"
            )
    return None


def no_device(x_TD: Tensor) -> str | None:
    """Says why nothing here runs the kernels on this tensor; None when something does."""
    if x_TD.device.type == "cpu" and not triton.knobs.runtime.interpret:
        return (
            "backend 'triton' runs on a GPU and x_TD is on the CPU; TRITON_INTERPRET=1, set "
            "before the first import, interprets the kernels there, slowly"
        )
    return None
