"""First launch with copies in few bits: what each neuron would do, threshold and list in one.

Letters: T tokens of one tile, D columns of one step, N neurons of one tile, F neurons.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from moe_tools.kernels.scores import FewBitScores
from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.device import activate, load_N, project_TN, with_bias_TN
from moe_tools.kernels.triton.kernel_launch import KernelLaunch, row_stride
from moe_tools.kernels.triton.lists import Lists, write_tile


@triton.jit
def list_proposed(
    x, gate, gate_scale, gate_stride, gate_bias, up, up_scale, up_stride, up_bias, norm, mask,
    neurons, counts, tickets, T, D, F, num_columns, above, threshold, up_threshold,
    ACT: tl.constexpr, UP_ACT: tl.constexpr, GATED: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the mask of a tile of neurons and lists those that some token is to compute."""
    tile, tokens = tl.program_id(0), tl.program_id(1)
    neuron_N = tile * TILE + tl.arange(0, TILE)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    on_N = neuron_N < F
    gate_TN, up_TN, _ = project_TN(
        x, None, gate, gate_scale, gate_stride, up, up_scale, up_stride, None, 0, token_T,
        neuron_N, neuron_N, on_N, T, D, BLOCK_T, TILE, BLOCK_D, OFFSET,
    )  # fmt: skip
    gate_TN = with_bias_TN(gate_TN, gate_bias, neuron_N, on_N)
    hidden_TN = activate(gate_TN, threshold, ACT)
    if GATED:
        up_TN = with_bias_TN(up_TN, up_bias, neuron_N, on_N)
        hidden_TN *= activate(up_TN, up_threshold, UP_ACT)
    size_TN = tl.abs(hidden_TN) * load_N(norm, neuron_N, on_N)[None, :]
    inside_TN = (token_T < T)[:, None] & on_N[None, :]
    runs_TN = (size_TN > above) & inside_TN
    to_TN = mask + token_T[:, None].to(tl.int64) * F + neuron_N[None, :]
    tl.store(to_TN, runs_TN.to(tl.uint8), mask=inside_TN)
    runs_N = tl.max(runs_TN.to(tl.int32), 0) > 0
    write_tile(
        neurons, counts, tickets, neuron_N, runs_N, tile, tokens, num_columns, TILE, COLUMNS
    )  # fmt: skip


def launch_list_proposed(
    call: Call, scores: FewBitScores, lists: Lists, mask_TF: Tensor
) -> KernelLaunch:
    """The launch that writes `mask_TF` and lists the neurons that it selects."""
    gate, up, tiling = scores.gate, scores.up, call.tiling
    # as many as 128 threads load in 16 bytes each, half a byte a column
    columns = 4096 // tiling.gate_tile
    sizes = {name: size for name, size in call.sizes.items() if name != "E"}
    arguments = {
        "x": scores.z_TD,
        "gate": gate.stored,
        "gate_scale": gate.scale_FG,
        "gate_stride": row_stride(gate.stored),
        "gate_bias": call.gate_F,
        "up": None if up is None else up.stored,
        "up_scale": None if up is None else up.scale_FG,
        "up_stride": 0 if up is None else row_stride(up.stored),
        "up_bias": call.up_F,
        "norm": scores.norm_F,
        "mask": mask_TF,
        **sizes,
        **call.activation,
        "above": scores.above,
        "OFFSET": gate.offset,
        "BLOCK_T": call.tokens,
        "BLOCK_D": replace(tiling, columns=columns).fitted(call.tokens, call.sizes["D"]).columns,
        **lists.to_write,
    }
    grid = (lists.num_tiles, call.token_tiles)
    return KernelLaunch(list_proposed, grid, arguments, call.tiling.warps, stages=1)
