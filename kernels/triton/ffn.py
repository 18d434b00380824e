"""`sparse_ffn` on the Triton kernels: checks, then the operator.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import astuple

import torch
import triton
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.triton.call import ZEROING
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_ffn_triton(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None = None,
    *,
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
        gate_first: compute the activation of every selected neuron first and go on with those
            where it is not zero (exact). By default, where the activation can be zero. Otherwise
            gate and up are computed together.
        atomic: add the shares of each sum as they come; y may then differ in the last bit from
            run to run.
        config: tile sizes, of `tune`; by default pinned ones.

    Raises:
        ValueError: what `unsupported` says; shapes that do not fit.
    """
    weights.check_call(x_TD, mask_TE)
    refusal = unsupported(weights, x_TD, gate_first)
    if refusal:
        raise ValueError(refusal)
    (first_FD, first_F, act), *second = _inputs(weights)
    up_FD, up_F, up_act = second[0] if second else (None, None, Act("identity"))
    y_TD: Tensor = forward(
        x_TD.reshape(-1, weights.width).contiguous(),
        *(first_FD, up_FD, weights.down_FD),
        None if mask_TE is None else mask_TE.reshape(-1, mask_TE.shape[-1]).contiguous(),
        *(first_F, up_F, weights.down_D),
        *(act.name, up_act.name, act.theta, up_act.theta),
        act.name in ZEROING if gate_first is None else gate_first,
        atomic,
        [] if config is None else list(astuple(config)),
    )
    return y_TD.view(x_TD.shape)


def unsupported(weights: FFNWeights, x_TD: Tensor, gate_first: bool | None = None) -> str | None:
    """Why these kernels cannot run this; None when they can."""
    rows = {"up_FD": weights.up_FD, "down_FD": weights.down_FD, "gate_FD": weights.gate_FD}
    for name, weight in rows.items():
        if weight is None:
            continue
        if weight.dtype != x_TD.dtype or x_TD.dtype not in DTYPES:
            return (
                f"x_TD is {x_TD.dtype} and {name} {weight.dtype}: backend 'triton' takes fp32, "
                "bf16 or fp16, one for all"
            )
        if weight.stride(1) != 1:
            return (
                f"{name} has strides {weight.stride()}: backend 'triton' reads a neuron as one "
                f"contiguous row; store {name}.contiguous() once, or `pack`"
            )
    acts = [act for _, _, act in weights.inputs]
    if not all(isinstance(act, Act) for act in acts):
        return "backend 'triton' knows activations by name: give a name or an Act, not a function"
    if gate_first and _inputs(weights)[0][2].name not in ZEROING:
        return f"gate_first needs an activation that can be zero: {', '.join(ZEROING)}"
    if x_TD.device.type == "cpu" and not triton.knobs.runtime.interpret:
        return (
            "backend 'triton' runs on a GPU and x_TD is on the CPU; TRITON_INTERPRET=1, set "
            "before the first import, interprets the kernels there, slowly"
        )
    return None


def _inputs(weights: FFNWeights) -> list[tuple[Tensor, Tensor | None, Act]]:
    return [(rows, bias, act) for rows, bias, act in weights.inputs if isinstance(act, Act)]


class TritonFFN(PackedFFN):
    """Copies of the weights, each row contiguous.

    Raises:
        ValueError: a dtype that the kernels do not read.
    """

    backend = "triton"

    def __init__(self, weights: FFNWeights, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"backend 'triton' stores fp32, bf16 and fp16, not {dtype}")

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)

        super().__init__(weights.changed(copy, copy))

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        with torch.no_grad():
            return sparse_ffn_triton(self.weights, x_TD, mask_TE)
