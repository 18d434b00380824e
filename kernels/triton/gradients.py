"""Last launches of the backward pass: the gradients of the weights and of the mask.

Each program owns what it writes and adds its tokens in order: nothing atomic.

Letters: T tokens of one tile, D columns of one tile, N neurons of one program, F neurons, E
experts.
"""

import triton
import triton.language as tl

from moe_tools.kernels.triton.device import load_weight_TN, load_x_TD, neuron_major


@triton.jit
def load_values_TN(values, tokens, neuron_N, runs_TN, F, BLOCK_T: tl.constexpr):
    """Neuron-major values; zero where the neuron does not run, where nothing was written."""
    from_TN = values + neuron_major(tokens, neuron_N, F, BLOCK_T)
    return tl.load(from_TN, mask=runs_TN, other=0.0)


@triton.jit
def add_outer(sums_ND, values_TN, x_TD, BLOCK_T: tl.constexpr):
    """Sums + values^T x."""
    if BLOCK_T == 1:
        return sums_ND + tl.trans(values_TN).to(tl.float32) * x_TD.to(tl.float32)
    else:
        return tl.dot(tl.trans(values_TN), x_TD, sums_ND, input_precision="ieee")


@triton.jit
def write_ND(to, sums_ND, neuron_N, column_D, D, inside_ND):
    """A tile of a weight's gradient."""
    at_ND = neuron_N[:, None].to(tl.int64) * D + column_D[None, :]
    tl.store(to + at_ND, sums_ND.to(to.dtype.element_ty), mask=inside_ND)


@triton.jit
def write_bias_N(to, sums_N, neuron_N, F):
    """A part of a bias's gradient, if there is one."""
    if to is not None:
        tl.store(to + neuron_N, sums_N.to(to.dtype.element_ty), mask=neuron_N < F)


@triton.jit
def compute_weight_grads(
    x, dy, mask, hidden, d_gate_x, d_up_x, d_gate, d_up, d_down, d_gate_bias, d_up_bias,
    T, D, F, E, token_tiles,
    GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of every weight's gradient; rows of neurons that no token selects are zero."""
    neuron_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gate_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    up_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    down_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    gate_N = tl.zeros((BLOCK_N,), tl.float32)
    up_N = tl.zeros((BLOCK_N,), tl.float32)
    for tokens in range(token_tiles):
        token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
        runs_TN = load_weight_TN(mask, token_T, neuron_N, neuron_N < F, T, F, E) != 0
        if tl.max(runs_TN.to(tl.int32)) > 0:
            x_TD = load_x_TD(x, token_T, column_D, T, D)
            dy_TD = load_x_TD(dy, token_T, column_D, T, D)
            values_TN = load_values_TN(hidden, tokens, neuron_N, runs_TN, F, BLOCK_T)
            down_ND = add_outer(down_ND, values_TN, dy_TD, BLOCK_T)
            values_TN = load_values_TN(d_gate_x, tokens, neuron_N, runs_TN, F, BLOCK_T)
            gate_ND = add_outer(gate_ND, values_TN, x_TD, BLOCK_T)
            gate_N += tl.sum(values_TN.to(tl.float32), 0)
            if GATED:
                values_TN = load_values_TN(d_up_x, tokens, neuron_N, runs_TN, F, BLOCK_T)
                up_ND = add_outer(up_ND, values_TN, x_TD, BLOCK_T)
                up_N += tl.sum(values_TN.to(tl.float32), 0)
    inside_ND = (neuron_N < F)[:, None] & (column_D < D)[None, :]
    write_ND(d_down, down_ND, neuron_N, column_D, D, inside_ND)
    write_ND(d_gate, gate_ND, neuron_N, column_D, D, inside_ND)
    if GATED:
        write_ND(d_up, up_ND, neuron_N, column_D, D, inside_ND)
    if tl.program_id(1) == 0:
        write_bias_N(d_gate_bias, gate_N, neuron_N, F)
        write_bias_N(d_up_bias, up_N, neuron_N, F)


@triton.jit
def compute_mask_grads(
    mask, d_weight, d_mask, T, F, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """The gradient of each selected expert's weight, added over its neurons; zero elsewhere."""
    expert_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.program_id(1)
    token_T = tokens * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_TE = (token_T < T)[:, None] & (expert_E < E)[None, :]
    at_TE = token_T[:, None].to(tl.int64) * E + expert_E[None, :]
    runs_TE = tl.load(mask + at_TE, mask=inside_TE, other=0.0) != 0
    size, longer = F // E, F % E
    start_E = expert_E * size + tl.minimum(expert_E, longer)
    length_E = size + (expert_E < longer).to(tl.int32)
    sums_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for neuron in range(size + 1):
        here_TE = runs_TE & (neuron < length_E)[None, :]
        sums_TE += load_values_TN(d_weight, tokens, start_E + neuron, here_TE, F, BLOCK_T)
    tl.store(d_mask + at_TE, sums_TE.to(d_mask.dtype.element_ty), mask=inside_TE)
