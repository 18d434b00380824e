"""A copy of the gate in eight bits that says which neurons cannot fire: those are not read in full.

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
from moe_tools.kernels.cpu.rows import PackedRows, allocate, row_bytes
from moe_tools.kernels.quantize import QUANTIZED, quantize_rows

ROUNDING = 2.0**-24
"""Of one sum in fp32, as a share of it."""


@dataclass(frozen=True)
class Screen:
    """What csrc/sparse_ffn.h reads first."""

    rows_FB: Tensor
    """int8, of whole cache lines."""
    scale_F: Tensor
    error_F: Tensor
    """|row - copy|, and what two sums in fp32 may be off for |x| = 1."""
    reach: float
    """Share of error |x| that is taken for possible: 1 is a proof."""


def make_screen(rows: PackedRows, sigmas: float) -> Screen:
    """From the rows of the first part, as they are stored; `inf` sigmas: nothing is missed."""
    row_FD = rows.matrix_FD(0, torch.float32)
    copy_FD, scale_F = quantize_rows(row_FD)
    rows_FB = allocate((len(row_FD), row_bytes(rows.width, torch.int8))).zero_()
    rows_FB[:, : rows.width] = copy_FD.view(torch.uint8)
    near_FD = copy_FD * scale_F[:, None]
    norms_F = row_FD.norm(dim=1) + near_FD.norm(dim=1)
    error_F = (row_FD - near_FD).norm(dim=1) + (rows.width + 8) * ROUNDING * norms_F
    return Screen(rows_FB, scale_F, error_F, min(1.0, sigmas / rows.width**0.5))


def no_screen(act: ActivationLike, dtype: torch.dtype, sigmas: float) -> str | None:
    """Why a gate cannot be screened; None when it can."""
    if not sigmas > 0:
        return f"screen is {sigmas}: give the margin in sigmas, above 0, or inf for a proof"
    kind = named(act)
    if not (isinstance(kind, Act) and kind.name in GIVES_ZEROS):
        return f"a screen needs an activation that is zero below a number: {', '.join(GIVES_ZEROS)}"
    if dtype in QUANTIZED:
        return f"a screen is of eight bits, weights in {dtype} are no larger: leave it out"
    return None
