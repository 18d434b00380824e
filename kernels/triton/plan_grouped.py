"""The launches for tokens grouped by expert, from shapes alone.

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token, P
pairs: T K of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_tools.kernels.triton.config import GROUPED, Config, next_power
from moe_tools.kernels.triton.config import MOST_TOGETHER as TOKENS
from moe_tools.kernels.triton.grouped import combine_pairs, compute_pairs_hidden, group_pairs
from moe_tools.kernels.triton.grouped_gradients import (
    compute_experts_grads,
    compute_pairs_hidden_grads,
)
from moe_tools.kernels.triton.plan import KernelLaunch

STEP = 1024
"""Pairs that `group_pairs` looks at in one go."""


@dataclass(frozen=True)
class GroupedCall:
    """The experts of one layer, and tokens that chose K of them each."""

    x_TD: Tensor
    gate_XND: Tensor
    up_XND: Tensor
    down_XND: Tensor
    chosen_TK: Tensor
    weight_TK: Tensor
    act: str = "silu"
    up_act: str = "identity"
    theta: float = 0.0
    up_theta: float = 0.0
    config: Config | None = None

    @classmethod
    def of(cls, *operands: Any, config: Sequence[int]) -> GroupedCall:
        """From what an operator's schema can say."""
        return replace(cls(*operands), config=Config(*config) if config else None)

    @cached_property
    def tiling(self) -> Config:
        """The tile sizes, fitted to the shape."""
        return (self.config or GROUPED).fitted(TOKENS, self.x_TD.shape[1])

    @cached_property
    def tiles(self) -> int:
        """The most that the pairs can make: every expert may leave one of its own unfilled."""
        return -(-self.chosen_TK.numel() // TOKENS) + len(self.gate_XND)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Arguments of every launch behind the first, but for the pairs."""
        (tokens, width), (experts, neurons, _) = self.x_TD.shape, self.gate_XND.shape
        sizes = {"T": tokens, "D": width, "N": neurons, "X": experts, "P": self.chosen_TK.numel()}
        return {**sizes, "BLOCK_T": TOKENS, "EXPERTS": next_power(experts)}

    @cached_property
    def activation(self) -> dict[str, Any]:
        """The two activations."""
        names = {"ACT": self.act, "UP_ACT": self.up_act}
        return {"theta": self.theta, "up_theta": self.up_theta, **names}

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that a kernel fills."""
        return torch.empty(shape, dtype=dtype, device=self.x_TD.device)

    def values(self) -> Tensor:
        """One for each neuron and pair of a tile."""
        return self.empty(self.tiles, self.gate_XND.shape[1], TOKENS, dtype=self.x_TD.dtype)


class _Pairs(NamedTuple):
    pairs: Tensor
    counts: Tensor


class GroupedGradients(NamedTuple):
    """What the launches of the backward pass write; x and weights still by pair."""

    x_PD: Tensor
    gate_XND: Tensor
    up_XND: Tensor
    down_XND: Tensor
    weight_PB: Tensor
    """B blocks of neurons, to be added."""


def plan_grouped(call: GroupedCall) -> tuple[list[KernelLaunch], Tensor]:
    """Three launches, and the y_PD that they write, in fp32: what each pair adds to its token."""
    pairs, group = _plan_pairs(call)
    hidden, y_PD = call.values(), _by_pair(call)
    rows, columns = call.tiling.rows, call.tiling.columns
    arguments = {
        **_inputs(call, pairs),
        "hidden": hidden,
        "BLOCK_N": rows,
        "BLOCK_D": columns,
    }
    grid = (-(-call.gate_XND.shape[1] // rows), call.tiles)
    return [
        group,
        KernelLaunch(compute_pairs_hidden, grid, arguments, call.tiling.warps),
        _plan_combine(call, pairs, [(hidden, call.down_XND)], y_PD),
    ], y_PD


def plan_grouped_backward(
    call: GroupedCall, dy_TD: Tensor
) -> tuple[list[KernelLaunch], GroupedGradients]:
    """Four launches; h is computed again."""
    pairs, group = _plan_pairs(call)
    rows = call.tiling.rows
    blocks = -(-call.gate_XND.shape[1] // rows)
    like = partial(torch.empty_like, memory_format=torch.contiguous_format)
    made = GroupedGradients(
        _by_pair(call),
        like(call.gate_XND),
        like(call.up_XND),
        like(call.down_XND),
        call.empty(call.chosen_TK.numel(), blocks, dtype=torch.float32),
    )
    hidden, d_gate_x, d_up_x = call.values(), call.values(), call.values()
    values = {"hidden": hidden, "d_gate_x": d_gate_x, "d_up_x": d_up_x}
    arguments = {
        **_inputs(call, pairs),
        **values,
        **_rows("down", call.down_XND),
        "dy": dy_TD,
        "d_weight": made.weight_PB,
        "BLOCK_N": rows,
        "BLOCK_D": call.tiling.columns,
    }
    back = [(d_gate_x, call.gate_XND), (d_up_x, call.up_XND)]
    return [
        group,
        KernelLaunch(
            compute_pairs_hidden_grads, (blocks, call.tiles), arguments, call.tiling.warps
        ),
        _plan_combine(call, pairs, back, made.x_PD),
        _plan_experts_grads(call, pairs, dy_TD, values, made),
    ], made


def _by_pair(call: GroupedCall) -> Tensor:
    return call.empty(call.chosen_TK.numel(), call.x_TD.shape[1], dtype=torch.float32)


def _plan_pairs(call: GroupedCall) -> tuple[_Pairs, KernelLaunch]:
    experts, tokens = len(call.gate_XND), len(call.x_TD)
    made = _Pairs(
        call.empty(experts, tokens, dtype=torch.int32), call.empty(experts, dtype=torch.int32)
    )
    sizes = {"T": tokens, "P": call.chosen_TK.numel(), "STEP": STEP}
    arguments = {"chosen": call.chosen_TK, **made._asdict(), **sizes}
    return made, KernelLaunch(group_pairs, (experts,), arguments, call.tiling.warps)


def _inputs(call: GroupedCall, pairs: _Pairs) -> dict[str, Any]:
    """What computes h from x."""
    return {
        **call.shared,
        **call.activation,
        **pairs._asdict(),
        **_rows("gate", call.gate_XND),
        **_rows("up", call.up_XND),
        "x": call.x_TD,
        "weight": call.weight_TK,
        "K": call.chosen_TK.shape[1],
    }


def _rows(name: str, weight_XND: Tensor) -> dict[str, Any]:
    expert, row, _ = weight_XND.stride()
    return {name: weight_XND, f"{name}_stride": row, f"{name}_expert": expert}


def _plan_combine(
    call: GroupedCall, pairs: _Pairs, sums: list[tuple[Tensor, Tensor]], y_PD: Tensor
) -> KernelLaunch:
    (hidden, rows), *more = sums
    hidden_2, rows_2 = more[0] if more else (None, None)
    expert_2, row_2 = (0, 0) if rows_2 is None else rows_2.stride()[:2]
    columns = call.tiling.down_columns
    arguments = {
        **call.shared,
        **pairs._asdict(),
        "hidden": hidden,
        "rows": rows,
        "stride": rows.stride(1),
        "rows_expert": rows.stride(0),
        "hidden_2": hidden_2,
        "rows_2": rows_2,
        "stride_2": row_2,
        "rows_2_expert": expert_2,
        "y": y_PD,
        "BLOCK_N": call.tiling.down_rows,
        "BLOCK_D": columns,
    }
    grid = (-(-y_PD.shape[1] // columns), call.tiles)
    return KernelLaunch(combine_pairs, grid, arguments, call.tiling.warps)


def _plan_experts_grads(
    call: GroupedCall,
    pairs: _Pairs,
    dy_TD: Tensor,
    values: dict[str, Tensor],
    made: GroupedGradients,
) -> KernelLaunch:
    rows, columns = min(32, call.tiling.rows), min(64, call.tiling.down_columns)  # three sums
    arguments = {
        **call.shared,
        **pairs._asdict(),
        **values,
        "x": call.x_TD,
        "dy": dy_TD,
        "d_gate": made.gate_XND,
        "d_up": made.up_XND,
        "d_down": made.down_XND,
        "K": call.chosen_TK.shape[1],
        "BLOCK_N": rows,
        "BLOCK_D": columns,
    }
    experts, neurons, width = call.gate_XND.shape
    grid = (-(-neurons // rows), -(-width // columns), experts)
    return KernelLaunch(compute_experts_grads, grid, arguments, call.tiling.warps)
