"""`CpuRouter`: which experts a token wants, said by the sigmoid of one linear, or of two.

Letters: T tokens (any leading dimensions), D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.native import address, extension
from moe_tools.kernels.cpu.rows import DTYPES, check_x


class CpuRouter:
    """sigmoid(W x + b) or sigmoid(W V x + b), above a threshold or the highest, in one call.

    Computes in fp32.

    Args:
        weight: W, without a bias.
        bias_E: b, fp32; read where it lies.
        by_rank: the highest scores; of equal ones the lower experts, and NaN counts as the highest.
        first: V, without a bias; None: x goes into W itself.

    Raises:
        ValueError: V and W do not fit.
    """

    def __init__(
        self,
        weight: CpuLinear,
        bias_E: Tensor | None,
        *,
        by_rank: bool,
        first: CpuLinear | None = None,
    ) -> None:
        self.weight, self.bias_E, self.by_rank, self.first = weight, bias_E, by_rank, first
        if first is not None and len(first.rows_NB) != weight.width:
            raise ValueError(
                f"the second linear takes {weight.width} numbers, and the first gives "
                f"{len(first.rows_NB)}"
            )
        self._native = extension()
        self.handle = self._native.prepare_router(
            weight=weight.handle,
            bias_E=address(bias_E),
            by_rank=int(by_rank),
            first=None if first is None else first.handle,
        )

    def __call__(self, x_TD: Tensor, knob: float) -> Tensor:
        """Computes mask_TE, bool, of x in fp32, bf16 or fp16 on the CPU.

        Args:
            x_TD: the tokens.
            knob: the threshold, which scores have to exceed, or how many are chosen.

        Raises:
            ValueError: another width, dtype or device, or fewer than one of the highest.
        """
        width = (self.first or self.weight).width
        check_x(x_TD, width, "router")
        if self.by_rank and knob < 1:
            raise ValueError(f"the highest {knob} experts: give a number of 1 or more")
        x_TD = x_TD.contiguous()  # stays alive until the kernel is done
        mask_TE = torch.empty((*x_TD.shape[:-1], len(self.weight.rows_NB)), dtype=torch.bool)
        self._native.choose(
            self.handle,
            threads=torch.get_num_threads(),
            x_TD=x_TD.data_ptr(),
            dtype=DTYPES.index(x_TD.dtype),
            tokens=x_TD.numel() // width,
            knob=float(knob),
            mask_TE=mask_TE.data_ptr(),
        )
        return mask_TE
