"""`moe_ffn` on the Triton kernels: a mask for few tokens, groups for many.

The experts of a layer, one after the other, are one FFN of X N neurons whose mask says which X a
token chose: few tokens go through the launches of `sparse_ffn`. With more than one tile of them the
union is soon everything, and the tokens are grouped by expert instead (`grouped`).

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS, Act, named
from moe_tools.kernels.moe import ExpertWeights
from moe_tools.kernels.triton.call import BIASES, SCALES
from moe_tools.kernels.triton.config import MOST_TOGETHER, Config
from moe_tools.kernels.triton.ffn import (
    DTYPES,
    UNNAMED,
    activation_options,
    elsewhere,
    no_device,
)
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.triton.op_grouped import grouped_forward


def moe_ffn_triton(
    experts: ExpertWeights,
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    *,
    gate_first: bool | None = None,
    config: Config | None = None,
) -> Tensor:
    """Computes y_TD as `moe_ffn` defines it. The host reads nothing of the device.

    A pair whose weight is zero is not computed in a small batch and gives its weight no gradient.

    Args:
        experts: W_down is copied in every call unless it is contiguous; gate and up where their
            rows are not.
        x_TD: in fp32, bf16 or fp16, as the experts.
        chosen_TK: which experts; no token chooses one twice.
        weight_TK: what their outputs are multiplied with; any floating dtype.
        gate_first: as in `sparse_ffn_triton`; groups compute gate and up together.
        config: tile sizes; by default pinned ones.

    Raises:
        ValueError: a dtype, an activation or a device that the kernels do not know.
    """
    refusal = unsupported(experts, x_TD, chosen_TK, weight_TK)
    if refusal:
        raise ValueError(refusal)
    x_TD, laid_out = x_TD.contiguous(), _laid_out(experts)
    options = {
        **activation_options(experts.act, experts.up_act),
        "config": [] if config is None else config.numbers,
    }
    if len(x_TD) > MOST_TOGETHER:
        return _grouped(laid_out, x_TD, chosen_TK, weight_TK, options)
    options["gate_first"] = options["act"] in GIVES_ZEROS if gate_first is None else gate_first
    return _masked(laid_out, x_TD, chosen_TK, weight_TK, options)


def _masked(
    experts: ExpertWeights,
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Computes y of few tokens: the experts are one FFN, the mask holds their weights."""
    mask_TX = weight_TK.new_zeros(len(x_TD), len(experts.gate_XND))
    y_TD: Tensor = forward(
        x_TD=x_TD,
        gate_FD=experts.gate_XND,
        up_FD=experts.up_XND,
        down_FD=experts.down_XND,
        mask_TE=mask_TX.scatter(1, chosen_TK, weight_TK),
        **dict.fromkeys((*BIASES, *SCALES, "off_F", "residual_TD")),
        atomic=False,
        **options,
    )
    return y_TD


def _grouped(
    experts: ExpertWeights,
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Computes y of many tokens, grouped by expert."""
    y_TD: Tensor = grouped_forward(
        x_TD=x_TD,
        gate_XND=experts.gate_XND,
        up_XND=experts.up_XND,
        down_XND=experts.down_XND,
        chosen_TK=chosen_TK.contiguous(),
        weight_TK=weight_TK.contiguous(),
        **options,
    )
    return y_TD


def _laid_out(experts: ExpertWeights) -> ExpertWeights:
    """Copies what the kernels cannot step through; gate and up need the same strides."""
    gate_XND, up_XND = _rows(experts.gate_XND), _rows(experts.up_XND)
    if gate_XND.stride() != up_XND.stride():
        gate_XND, up_XND = _contiguous(gate_XND), _contiguous(up_XND)
    down_XND = _contiguous(experts.down_XND)
    return replace(experts, gate_XND=gate_XND, up_XND=up_XND, down_XND=down_XND)


def _rows(weight_XND: Tensor) -> Tensor:
    """Copies weights unless their rows are contiguous and experts a whole number of them apart."""
    expert, row, column = weight_XND.stride()
    whole = column == 1 and row > 0 and expert % row == 0
    return weight_XND if whole else _contiguous(weight_XND)


def _contiguous(weight_XND: Tensor) -> Tensor:
    """Copies a view, and writes down the strides of a contiguous one.

    PyTorch lets a dimension of size one have any stride; the kernels would follow it.
    """
    return weight_XND.reshape(-1).view(weight_XND.shape)


def unsupported(
    experts: ExpertWeights, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor
) -> str | None:
    """Says why these kernels cannot run this; None when they can."""
    dtypes = {x_TD.dtype, experts.gate_XND.dtype, experts.up_XND.dtype, experts.down_XND.dtype}
    if len(dtypes) > 1 or x_TD.dtype not in DTYPES:
        found = ", ".join(sorted(map(str, dtypes)))
        return f"x_TD and the experts are {found}: the kernels take fp32, bf16 or fp16, one for all"
    if not all(isinstance(named(act), Act) for act in (experts.act, experts.up_act)):
        return UNNAMED
    if torch.compiler.is_compiling():
        return None  # the devices of a graph's tensors do not change
    rows = {"gate_XND": experts.gate_XND, "up_XND": experts.up_XND, "down_XND": experts.down_XND}
    others = {**rows, "chosen_TK": chosen_TK, "weight_TK": weight_TK}
    return elsewhere(x_TD, others) or no_device(x_TD)
