"""Screens the gate: an int8 copy says which neurons cannot fire, and their rows are not read.

The activation is zero below a threshold, so a neuron is out once copy . x + |row - copy| |x| is
below it (Cauchy-Schwarz). Nearly always it is out much earlier: rounding errors look random to x,
and their product with it has a standard deviation of |row - copy| |x| / sqrt(D).

Letters: D model width, F neurons, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS, Act, ActivationLike, named
from moe_tools.kernels.cpu.ffn_rows import PackedRows
from moe_tools.kernels.cpu.memory import LINE, allocate
from moe_tools.kernels.quantize import QUANTIZED, quantize_rows

ROUNDING = 2.0**-24
"""The rounding error of one sum in fp32, as a share of the sum."""


@dataclass(frozen=True)
class Screen:
    """The copy and its errors, as `Screen` of csrc/sparse_ffn.h."""

    rows_FB: Tensor
    """The copy in int8, each row padded to whole cache lines."""
    scale_F: Tensor
    error_F: Tensor
    """|row - copy|, plus the rounding error of two sums in fp32 for |x| = 1."""
    reach: float
    """How much of the bound error * |x| is assumed; with 1 nothing can be missed."""


def make_screen(rows: PackedRows, sigmas: float) -> Screen:
    """Makes the screen of the rows of the first part; with `inf` sigmas it misses nothing."""
    row_FD = rows.matrix_FD(0, torch.float32)
    copy_FD, scale_F = quantize_rows(row_FD)
    rows_FB = allocate((len(row_FD), -(-rows.width // LINE) * LINE)).zero_()
    rows_FB[:, : rows.width] = copy_FD.view(torch.uint8)
    near_FD = copy_FD * scale_F[:, None]
    norms_F = row_FD.norm(dim=1) + near_FD.norm(dim=1)
    error_F = (row_FD - near_FD).norm(dim=1) + (rows.width + 8) * ROUNDING * norms_F
    return Screen(rows_FB, scale_F, error_F, min(1.0, sigmas / rows.width**0.5))


def no_screen(act: ActivationLike, dtype: torch.dtype, sigmas: float) -> str | None:
    """Returns why a gate cannot be screened; None when it can."""
    if not sigmas > 0:
        return f"screen is {sigmas}: give the margin in sigmas, above 0, or inf for a proof"
    kind = named(act)
    if not (isinstance(kind, Act) and kind.name in GIVES_ZEROS):
        return f"a screen needs an activation that is zero below a number: {', '.join(GIVES_ZEROS)}"
    if dtype in QUANTIZED:
        return f"a screen is of eight bits, weights in {dtype} are no larger: leave it out"
    return None
