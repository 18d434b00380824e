"""`CpuProposal`: which single neurons a token wants, said by copies of their rows in few bits.

Letters: T tokens (any leading dimensions), D model width, F neurons.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.native import extension
from moe_tools.kernels.cpu.rows import DTYPES, check_x


class CpuProposal:
    """|act(gate~ x) * up_act(up~ x)| * norm > tau, in one native call; in fp32, whatever x is.

    Args:
        up: copies of the rows of up, with their biases.
        gate: likewise; None: the FFN has no gate, and the score is |act(up~ x)| * norm.
        act: of the gate, or of up where there is none.
        up_act: of up behind a gate.
        norm_F: in fp32.
    """

    def __init__(
        self, up: CpuLinear, gate: CpuLinear | None, act: Act, up_act: Act, norm_F: Tensor
    ) -> None:
        norm_F = norm_F.detach().float().contiguous().clone()
        self._made_of = up, gate, act, up_act, norm_F
        self._native = extension()
        self._width, self._neurons = up.width, len(up.rows_NB)
        self.handle = self._native.prepare_proposal(
            gate=None if gate is None else gate.handle,
            up=up.handle,
            act=act.code,
            threshold=act.threshold,
            up_act=up_act.code,
            up_threshold=up_act.threshold,
            norm_F=norm_F.data_ptr(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns the proposal itself: it never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what it was made of."""
        return CpuProposal, self._made_of

    def __call__(self, x_TD: Tensor, tau: float) -> Tensor:
        """Computes mask_TF, bool, of x in fp32, bf16 or fp16 on the CPU.

        Raises:
            ValueError: another width, dtype or device.
        """
        check_x(x_TD, self._width, "proposal")
        x_TD = x_TD.contiguous()  # stays alive until the kernel is done
        mask_TF = torch.empty((*x_TD.shape[:-1], self._neurons), dtype=torch.bool)
        self._native.propose(
            self.handle,
            threads=torch.get_num_threads(),
            x_TD=x_TD.data_ptr(),
            dtype=DTYPES.index(x_TD.dtype),
            tokens=x_TD.numel() // self._width,
            knob=tau,
            mask_TE=mask_TF.data_ptr(),
        )
        return mask_TF
