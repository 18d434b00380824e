"""Registers the native CPU kernels as an operator, for torch.compile and torch.export.

Eager calls go past it: an operator of Python costs tens of microseconds a call, the kernels' own
call less than one. Its operands are tensors, numbers and names, so a graph that holds it can be
copied, saved and run anywhere; each call prepares the kernels anew, for a few microseconds.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts, P parts of a
neuron, B bytes of a row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act, ActName
from moe_tools.kernels.cpu.ffn_rows import PackedRows
from moe_tools.kernels.cpu.rows import DTYPES, NAMES
from moe_tools.kernels.cpu.screen import Screen
from moe_tools.kernels.cpu.stored import Kernel, StoredFFN


@torch.library.custom_op("moe_tools::sparse_ffn_cpu", mutates_args=())
def sparse_ffn_cpu(
    x_TD: Tensor,
    mask_TE: Tensor | None,
    bytes_FPB: Tensor,
    dtype: str,
    width: int,
    biases_FP: Tensor | None,
    off_F: Tensor | None,
    bias_D: Tensor | None,
    down_D: Tensor | None,
    screen_FB: Tensor | None,
    screen_scale_F: Tensor | None,
    screen_error_F: Tensor | None,
    screen_reach: float,
    act: str,
    threshold: float,
    up_act: str,
    up_threshold: float,
    or_dense: bool,
    isa: str | None,
) -> Tensor:
    """Computes y_TD; the operands are the fields of `StoredFFN`, `PackedRows` and `Screen`."""
    stored = DTYPES[NAMES.index(dtype)]
    rows = PackedRows(bytes_FPB, stored, width, biases_FP, off_F, bias_D, down_D)
    screen = None
    if screen_FB is not None and screen_scale_F is not None and screen_error_F is not None:
        screen = Screen(screen_FB, screen_scale_F, screen_error_F, screen_reach)
    first, second = Act(cast(ActName, act), threshold), Act(cast(ActName, up_act), up_threshold)
    return Kernel(StoredFFN(rows, first, second, screen, or_dense, isa))(x_TD, mask_TE)


@sparse_ffn_cpu.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


def operands(stored: StoredFFN) -> dict[str, Any]:
    """Returns what the operator takes besides x and the mask, by name."""
    rows, screen = stored.rows, stored.screen
    return {
        "bytes_FPB": rows.bytes_FPB,
        "dtype": NAMES[DTYPES.index(rows.dtype)],
        "width": rows.width,
        "biases_FP": rows.biases_FP,
        "off_F": rows.off_F,
        "bias_D": rows.bias_D,
        "down_D": rows.down_D,
        "screen_FB": None if screen is None else screen.rows_FB,
        "screen_scale_F": None if screen is None else screen.scale_F,
        "screen_error_F": None if screen is None else screen.error_F,
        "screen_reach": 1.0 if screen is None else screen.reach,
        "act": stored.act.name,
        "threshold": stored.act.threshold,
        "up_act": stored.up_act.name,
        "up_threshold": stored.up_act.threshold,
        "or_dense": stored.or_dense,
        "isa": stored.isa,
    }
