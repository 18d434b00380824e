"""The operators that select for themselves: a linear router's, and that of copies in few bits.

They have no gradients: what they select is not differentiable, and their weights are packed.

Letters: T tokens, D model width, F neurons, R experts that are routed, G groups of 32 columns, P
stored columns, K numbers that a score takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.scores import FewBitScores, LinearScores
from moe_tools.kernels.triton.op import FFN, OPTIONS, compute, like_x
from moe_tools.kernels.triton.stored import Rows


def _routed(*operands: Tensor, above: float, shared: int, **options: Any) -> Tensor:
    """Computes y_TD of the experts that `LinearScores` select."""
    *ffn, z_TK, weight_RK, bias_R = operands
    return compute(ffn, options, LinearScores(z_TK, weight_RK, bias_R, above, shared))


def _proposed(*operands: Tensor, above: float, offset: float, **options: Any) -> Tensor:
    """Computes y_TD of the neurons that `FewBitScores` select."""
    *ffn, z_TD, gate_FP, gate_scale_FG, up_FP, up_scale_FG, norm_F = operands
    gate = Rows(gate_FP, gate_scale_FG, offset)
    up = None if up_FP is None else Rows(up_FP, up_scale_FG, offset)
    return compute(ffn, options, FewBitScores(z_TD, gate, up, norm_F, above))


routed = torch.library.custom_op(
    "moe_tools::routed_ffn_triton",
    _routed,
    mutates_args=(),
    schema=f"({FFN}, Tensor z_TK, Tensor weight_RK, Tensor? bias_R, "
    f"*, float above, int shared, {OPTIONS}) -> Tensor",
)
routed.register_fake(like_x)

proposed = torch.library.custom_op(
    "moe_tools::proposed_ffn_triton",
    _proposed,
    mutates_args=(),
    schema=f"({FFN}, Tensor z_TD, Tensor gate_copy_FP, Tensor gate_copy_scale_FG, "
    "Tensor? up_copy_FP, Tensor? up_copy_scale_FG, Tensor norm_F, "
    f"*, float above, float offset, {OPTIONS}) -> Tensor",
)
proposed.register_fake(like_x)
