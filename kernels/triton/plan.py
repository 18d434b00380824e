"""What is launched, and with what: a plan is made from shapes alone, never from values.

So the host never waits for the device, the launches can be captured in a CUDA graph, and tensors
without data (device "meta") make a plan too: it is what `resources` compiles and what the tests
count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.triton.call import Call, Lists
from moe_tools.kernels.triton.combine import add_shares, combine
from moe_tools.kernels.triton.config import next_power
from moe_tools.kernels.triton.hidden import compute_hidden
from moe_tools.kernels.triton.lists import list_experts, list_firing


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel, its grid and every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int = 2
    """Steps of a loop in flight at once."""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told. FP fusion is said because its default is to change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launches it; returns at once."""
        self.kernel[self.grid](**self.arguments, **self.options)


def plan_forward(call: Call) -> tuple[list[KernelLaunch], Tensor]:
    """The y_TD and its launches: list the neurons, compute h, combine the rows.

    Three, and a fourth to add the shares where launch three does not (`Call.tickets`).
    """
    lists = Lists.of(call, call.tiling.gate_tile if call.gate_first else call.tiling.tile)
    gates = call.values(torch.float32) if call.gate_first else None
    hidden, y_TD = call.values(), torch.empty_like(call.x_TD)
    launches = [
        plan_list(call, lists) if gates is None else _plan_firing(call, lists, gates),
        _plan_hidden(call, lists, gates, hidden),
        *_plan_down(call, lists, hidden, y_TD),
    ]
    return launches, y_TD


def plan_list(call: Call, lists: Lists) -> KernelLaunch:
    """Launch one, by the mask."""
    sizes = {name: size for name, size in call.sizes.items() if name != "D"}
    arguments = {"mask": call.mask, **sizes, "BLOCK_T": call.tokens, **lists.for_launch_one}
    grid = (lists.num_tiles, call.token_tiles)
    return KernelLaunch(list_experts, grid, arguments, call.tiling.warps)


def _plan_firing(call: Call, lists: Lists, gates: Tensor) -> KernelLaunch:
    arguments = {
        "x": call.x_TD,
        "gate": call.gate_FD,
        "gate_stride": stride(call.gate_FD),
        "gate_scale": call.gate_scale_F,
        "gate_bias": call.gate_F,
        "mask": call.mask,
        "gates": gates,
        **call.sizes,
        **call.grouping,
        "theta": call.theta,
        "ACT": call.act,
        "BLOCK_T": call.tokens,
        "BLOCK_D": call.tiling.columns,
        **lists.for_launch_one,
    }
    grid = (lists.num_tiles, call.token_tiles)
    return KernelLaunch(list_firing, grid, arguments, call.tiling.warps, call.stages)


def _plan_hidden(call: Call, lists: Lists, gates: Tensor | None, hidden: Tensor) -> KernelLaunch:
    arguments = {
        **for_launch_two(call, lists),
        "gate": call.gate_FD if gates is None else None,
        "gate_scale": call.gate_scale_F,
        "up_scale": call.up_scale_F,
        "gates": gates,
        "hidden": hidden,
    }
    return KernelLaunch(
        compute_hidden, grid_two(call, lists), arguments, call.tiling.warps, call.stages
    )


def for_launch_two(call: Call, lists: Lists) -> dict[str, Any]:
    """What launch two takes in both directions."""
    return {
        "x": call.x_TD,
        "up": call.up_FD,
        "gate_stride": stride(call.gate_FD),
        "up_stride": stride(call.up_FD),
        "gate_bias": call.gate_F,
        "up_bias": call.up_F,
        "mask": call.mask,
        **call.sizes,
        **call.grouping,
        **call.activation,
        "BLOCK_T": call.tokens,
        "BLOCK_N": call.tiling.rows,
        "BLOCK_D": call.tiling.columns,
        **lists.for_launch_two,
    }


def grid_two(call: Call, lists: Lists) -> tuple[int, int]:
    """Programs for a list that is full; those beyond its end stop at once."""
    return (lists.num_tiles * (lists.tile // call.tiling.rows), call.token_tiles)


def _plan_down(call: Call, lists: Lists, hidden: Tensor, y_TD: Tensor) -> list[KernelLaunch]:
    own = {
        "bias": call.down_D,
        "scale": call.down_scale_F,
        "group": call.neurons,
        "skip": 0,
        "SKIP_ZEROS": call.skips_zeros,
    }
    return plan_combine(call, lists, [(hidden, call.down_FD)], y_TD, own)


def plan_combine(
    call: Call,
    lists: Lists,
    pairs: list[tuple[Tensor, Tensor]],
    y_TD: Tensor,
    own: dict[str, Any],
) -> list[KernelLaunch]:
    """Launch three: y_TD from one or two pairs of values and rows; `own` are its own arguments."""
    (hidden, rows), (hidden_2, rows_2) = (*pairs, (None, None))[:2]
    splits, width = call.tiling.splits, y_TD.shape[1]
    places, make = (1, torch.zeros) if call.atomic else (splits, torch.empty)
    shape = (call.token_tiles, places, call.tokens, width)
    shared = {
        "bias": own["bias"],
        "partials": make(shape, dtype=torch.float32, device=y_TD.device),
        "y": y_TD,
        "T": len(y_TD),
        "D": width,
        "BLOCK_T": call.tokens,
        "BLOCK_D": call.tiling.down_columns,
    }
    arguments = {
        **shared,
        **own,
        "hidden": hidden,
        "rows": rows,
        "stride": stride(rows),
        "hidden_2": hidden_2,
        "rows_2": rows_2,
        "stride_2": stride(rows_2),
        "packed": lists.packed,
        "counts": lists.counts,
        "tickets": lists.tickets,
        "F": call.sizes["F"],
        "num_tiles": lists.num_tiles,
        "TILES": next_power(lists.num_tiles),
        "ATOMIC": call.atomic,
        "TICKETS": call.tickets,
        "SPLITS": splits,
        "BLOCK_N": call.tiling.down_rows,
    }
    warps, grid = call.tiling.warps, (lists.columns, splits, call.token_tiles)
    launches = [KernelLaunch(combine, grid, arguments, warps, call.stages)]
    if not call.tickets:
        grid_of_sums = (lists.columns, call.token_tiles)
        launches.append(KernelLaunch(add_shares, grid_of_sums, {**shared, "PLACES": places}, warps))
    return launches


def stride(weight_FD: Tensor | None) -> int:
    """Elements from one neuron's row to the next."""
    return 0 if weight_FD is None else weight_FD.stride(-2)
