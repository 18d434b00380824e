"""What is launched, and with what: a plan is made from shapes alone, never from values.

So the host never waits for the device, the launches can be captured in a CUDA graph, and tensors
without data (device "meta") make a plan too: it is what `resources` compiles and what the tests
count.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from moe_tools.kernels.triton.combine import combine
from moe_tools.kernels.triton.config import Config, next_power, pinned, tokens_of_a_program
from moe_tools.kernels.triton.gradients import compute_mask_grads, compute_weight_grads
from moe_tools.kernels.triton.hidden import compute_hidden, compute_hidden_grads
from moe_tools.kernels.triton.lists import list_experts, list_firing

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "fatrelu", "drelu"]
ZEROING = ("relu", "fatrelu", "drelu")
"""Activations that are zero up to a threshold: their neurons can be left out without an error."""


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told. FP fusion is said because its default is to change."""
        return {"num_warps": self.warps, "num_stages": 2, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launches it; returns at once."""
        self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True)
class Call:
    """The operands of one FFN. A plain FFN has no `up`: its one projection stands in `gate`."""

    x_TD: Tensor
    gate_FD: Tensor
    """The rows under the activation."""
    up_FD: Tensor | None
    """The rows that multiply it."""
    down_FD: Tensor
    mask_TE: Tensor
    act: Act
    threshold: float = 0.0
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    gate_first: bool = False
    atomic: bool = False
    config: Config | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """T, D, F and E as the kernels take them."""
        (tokens, width), (neurons, _) = self.x_TD.shape, self.gate_FD.shape
        return {"T": tokens, "D": width, "F": neurons, "E": self.mask_TE.shape[1]}

    @cached_property
    def tokens(self) -> int:
        """Of one program."""
        return tokens_of_a_program(len(self.x_TD))

    @cached_property
    def token_tiles(self) -> int:
        """Each with a list of its own."""
        return -(-len(self.x_TD) // self.tokens)

    @cached_property
    def tiling(self) -> Config:
        """The tile sizes, fitted to the shape."""
        config = self.config or pinned(self.tokens)
        return config.fitted(self.tokens, self.x_TD.shape[1])

    @cached_property
    def mask(self) -> Tensor:
        """The mask as numbers a kernel can load."""
        return self.mask_TE.view(torch.uint8) if self.mask_TE.dtype == torch.bool else self.mask_TE

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that a kernel fills."""
        return torch.empty(shape, dtype=dtype, device=self.x_TD.device)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """One value for each token and neuron, neuron by neuron; written where a neuron runs."""
        shape = (self.token_tiles, len(self.gate_FD), self.tokens)
        return self.empty(*shape, dtype=dtype or self.x_TD.dtype)


@dataclass(frozen=True)
class _Lists:
    """What launch one writes, and the packed list that launch two makes of it."""

    tile: int
    num_tiles: int
    columns: int
    neurons: Tensor
    counts: Tensor
    packed: Tensor
    tickets: Tensor

    @classmethod
    def of(cls, call: Call, tile: int) -> _Lists:
        num_tiles = -(-len(call.gate_FD) // tile)
        columns = -(-call.x_TD.shape[1] // call.tiling.down_columns)
        sizes = (num_tiles * tile, num_tiles, len(call.gate_FD), columns)
        made = [call.empty(call.token_tiles, size, dtype=torch.int32) for size in sizes]
        return cls(tile, num_tiles, columns, *made)

    def for_launch_one(self) -> dict[str, Any]:
        return {
            "neurons": self.neurons,
            "counts": self.counts,
            "tickets": self.tickets,
            "num_columns": self.columns,
            "TILE": self.tile,
            "COLUMNS": next_power(self.columns),
        }

    def for_launch_two(self) -> dict[str, Any]:
        return {
            "neurons": self.neurons,
            "counts": self.counts,
            "packed": self.packed,
            "num_tiles": self.num_tiles,
            "TILE": self.tile,
            "TILES": next_power(self.num_tiles),
        }


def plan_forward(call: Call) -> tuple[list[Launch], Tensor]:
    """Three launches and the y_TD they write: list the neurons, compute h, combine the rows."""
    lists = _Lists.of(call, call.tiling.gate_tile if call.gate_first else call.tiling.tile)
    gates = call.values(torch.float32) if call.gate_first else None
    hidden, y_TD = call.values(), torch.empty_like(call.x_TD)
    skip = call.act in ZEROING and (call.act == "drelu" or not call.gate_first)
    launches = [
        _list_firing(call, lists, gates) if call.gate_first else _list_experts(call, lists),
        _compute_hidden(call, lists, gates, hidden),
        _combine(call, lists, [(hidden, call.down_FD)], call.down_bias_D, y_TD, skip),
    ]
    return launches, y_TD


@dataclass(frozen=True)
class Gradients:
    """Of every operand that has one; None where the operand is None or not asked for."""

    x_TD: Tensor
    gate_FD: Tensor
    up_FD: Tensor | None
    down_FD: Tensor
    mask_TE: Tensor | None
    gate_bias_F: Tensor | None
    up_bias_F: Tensor | None


def plan_backward(call: Call, dy_TD: Tensor) -> tuple[list[Launch], Gradients]:
    """Four launches, five with a mask that learns, and the gradients they write.

    The list is made again and h is computed again: nothing but the operands is kept for it.
    """
    lists = _Lists.of(call, call.tiling.tile)
    hidden, d_gate = call.values(), call.values()
    d_up = None if call.up_FD is None else call.values()
    learns = call.mask_TE.dtype.is_floating_point
    d_weight = call.values(torch.float32) if learns else None
    made = Gradients(
        torch.empty_like(call.x_TD),
        *(_like(w) for w in (call.gate_FD, call.up_FD, call.down_FD)),  # type: ignore[arg-type]
        mask_TE=_like(call.mask_TE) if learns else None,
        gate_bias_F=_like(call.gate_bias_F),
        up_bias_F=_like(call.up_bias_F),
    )
    pairs = [(d_gate, call.gate_FD)]
    if call.up_FD is not None and d_up is not None:
        pairs.append((d_up, call.up_FD))
    launches = [
        _list_experts(call, lists),
        _compute_hidden_grads(call, lists, dy_TD, hidden, d_gate, d_up, d_weight),
        _combine(call, lists, pairs, None, made.x_TD, skip=False),
        _compute_weight_grads(call, dy_TD, hidden, d_gate, d_up, made),
    ]
    if d_weight is not None and made.mask_TE is not None:
        launches.append(_compute_mask_grads(call, d_weight, made.mask_TE))
    return launches, made


def _like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _stride(weight_FD: Tensor | None) -> int:
    return 0 if weight_FD is None else weight_FD.stride(0)


def _list_experts(call: Call, lists: _Lists) -> Launch:
    sizes = {name: size for name, size in call.sizes.items() if name != "D"}
    arguments = {"mask": call.mask, **sizes, "BLOCK_T": call.tokens, **lists.for_launch_one()}
    grid = (lists.num_tiles, call.token_tiles)
    return Launch(list_experts, grid, arguments, call.tiling.warps)


def _list_firing(call: Call, lists: _Lists, gates: Tensor | None) -> Launch:
    arguments = {
        "x": call.x_TD,
        "gate": call.gate_FD,
        "gate_stride": _stride(call.gate_FD),
        "gate_bias": call.gate_bias_F,
        "mask": call.mask,
        "gates": gates,
        **_activation(call),
        "BLOCK_T": call.tokens,
        "BLOCK_D": call.tiling.columns,
        **lists.for_launch_one(),
    }
    grid = (lists.num_tiles, call.token_tiles)
    return Launch(list_firing, grid, arguments, call.tiling.warps)


def _activation(call: Call) -> dict[str, Any]:
    return {**call.sizes, "threshold": call.threshold, "ACT": call.act}


def _for_launch_two(call: Call, lists: _Lists) -> dict[str, Any]:
    return {
        "x": call.x_TD,
        "up": call.up_FD,
        "gate_stride": _stride(call.gate_FD),
        "up_stride": _stride(call.up_FD),
        "gate_bias": call.gate_bias_F,
        "up_bias": call.up_bias_F,
        "mask": call.mask,
        **_activation(call),
        "GATED": call.up_FD is not None,
        "BLOCK_T": call.tokens,
        "BLOCK_N": call.tiling.rows,
        "BLOCK_D": call.tiling.columns,
        **lists.for_launch_two(),
    }


def _grid_two(call: Call, lists: _Lists) -> tuple[int, int]:
    return (lists.num_tiles * (lists.tile // call.tiling.rows), call.token_tiles)


def _compute_hidden(call: Call, lists: _Lists, gates: Tensor | None, hidden: Tensor) -> Launch:
    arguments = {
        **_for_launch_two(call, lists),
        "gate": None if call.gate_first else call.gate_FD,
        "gates": gates,
        "hidden": hidden,
    }
    return Launch(compute_hidden, _grid_two(call, lists), arguments, call.tiling.warps)


def _compute_hidden_grads(
    call: Call,
    lists: _Lists,
    dy_TD: Tensor,
    hidden: Tensor,
    d_gate: Tensor,
    d_up: Tensor | None,
    d_weight: Tensor | None,
) -> Launch:
    arguments = {
        **_for_launch_two(call, lists),
        "dy": dy_TD,
        "gate": call.gate_FD,
        "down": call.down_FD,
        "down_stride": _stride(call.down_FD),
        "hidden": hidden,
        "d_gate": d_gate,
        "d_up": d_up,
        "d_weight": d_weight,
    }
    return Launch(compute_hidden_grads, _grid_two(call, lists), arguments, call.tiling.warps)


def _combine(
    call: Call,
    lists: _Lists,
    pairs: list[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    y_TD: Tensor,
    skip: bool,
) -> Launch:
    hidden_2, rows_2 = pairs[1] if len(pairs) == 2 else (None, None)
    splits, width = call.tiling.splits, y_TD.shape[1]
    make = torch.zeros if call.atomic else torch.empty
    shape = (call.token_tiles, 1 if call.atomic else splits, call.tokens, width)
    arguments = {
        "hidden": pairs[0][0],
        "rows": pairs[0][1],
        "stride": _stride(pairs[0][1]),
        "hidden_2": hidden_2,
        "rows_2": rows_2,
        "stride_2": _stride(rows_2),
        "packed": lists.packed,
        "counts": lists.counts,
        "bias": bias,
        "partials": make(shape, dtype=torch.float32, device=y_TD.device),
        "tickets": lists.tickets,
        "y": y_TD,
        "num_tiles": lists.num_tiles,
        "TILES": next_power(lists.num_tiles),
        "T": len(y_TD),
        "D": width,
        "F": call.sizes["F"],
        "ATOMIC": call.atomic,
        "SKIP_ZEROS": skip,
        "SPLITS": splits,
        "BLOCK_T": call.tokens,
        "BLOCK_N": call.tiling.down_rows,
        "BLOCK_D": call.tiling.down_columns,
    }
    grid = (lists.columns, splits, call.token_tiles)
    return Launch(combine, grid, arguments, call.tiling.warps)


def _compute_weight_grads(
    call: Call,
    dy_TD: Tensor,
    hidden: Tensor,
    d_gate: Tensor,
    d_up: Tensor | None,
    made: Gradients,
) -> Launch:
    rows, columns = max(16, call.tiling.rows), min(64, call.tiling.down_columns)
    arguments = {
        "x": call.x_TD,
        "dy": dy_TD,
        "mask": call.mask,
        "hidden": hidden,
        "d_gate_x": d_gate,
        "d_up_x": d_up,
        "d_gate": made.gate_FD,
        "d_up": made.up_FD,
        "d_down": made.down_FD,
        "d_gate_bias": made.gate_bias_F,
        "d_up_bias": made.up_bias_F,
        **call.sizes,
        "token_tiles": call.token_tiles,
        "GATED": call.up_FD is not None,
        "BLOCK_T": call.tokens,
        "BLOCK_N": rows,
        "BLOCK_D": columns,
    }
    grid = (-(-call.sizes["F"] // rows), -(-call.sizes["D"] // columns))
    return Launch(compute_weight_grads, grid, arguments, call.tiling.warps)


def _compute_mask_grads(call: Call, d_weight: Tensor, d_mask: Tensor) -> Launch:
    sizes = {name: size for name, size in call.sizes.items() if name != "D"}
    arguments = {
        "mask": call.mask,
        "d_weight": d_weight,
        "d_mask": d_mask,
        **sizes,
        "BLOCK_T": call.tokens,
        "BLOCK_E": 32,
    }
    grid = (-(-call.sizes["E"] // 32), call.token_tiles)
    return Launch(compute_mask_grads, grid, arguments, call.tiling.warps)
