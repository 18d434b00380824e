"""The product of x with rows in few bits, by PyTorch's int4 kernel for CPUs.

Copies of 2, 3 and 4 bits are all read as 4: a kernel of their own would read what they have.

Letters: T tokens (any leading dimensions), D columns, F rows, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.kernels.few_bits import GROUP, FewBits

TILE = 16
"""Rows that PyTorch packs together."""


def cannot_pack(rows_FD: Tensor, bits: int) -> str | None:
    """Why the copy of some rows in so many bits cannot be packed; None: it can.

    Nothing is copied to find out: shape and device tell.
    """
    rows, columns = rows_FD.shape
    if rows_FD.device.type != "cpu":
        return f"rows in few bits on {rows_FD.device}: they are packed on a CPU alone"
    if bits > 4:
        return f"proposals in {bits} bits: there is no kernel for them yet, take 4 or fewer"
    if columns % GROUP or rows % TILE:
        return f"proposals of {rows} x {columns}: the kernel takes {TILE}s x {GROUP}s"
    return None


class PackedBits:
    """Rows in few bits, in the form that the kernel reads."""

    def __init__(self, few: FewBits, dtype: torch.dtype) -> None:
        """Packs rows for inputs of a dtype (fp32, bf16 or fp16)."""
        codes_FD = few.codes_FD.int() + 8
        self.codes = torch._convert_weight_to_int4pack_for_cpu(codes_FD, 1)
        scale_FG = few.scale_FG.to(dtype)
        pairs = torch.stack([scale_FG.T, few.offset * scale_FG.T], dim=2)
        self.scales_GF2 = pairs.contiguous()
        """The scale, and what 0 stands for: w = (code - 8) scale + offset scale."""

    def __call__(self, x_TD: Tensor) -> Tensor:
        """x W^T: (T, F), in the dtype of x."""
        flat_TD = x_TD.reshape(-1, x_TD.shape[-1]).contiguous()
        made_TF: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat_TD, self.codes, GROUP, self.scales_GF2
        )
        return made_TF.view(*x_TD.shape[:-1], -1)
