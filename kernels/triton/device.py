"""Holds what the kernels share: loads, products and activations, one idea a function.

Letters: T tokens of one tile, D columns of one step, N neurons of one program, F neurons, E
experts. A neuron is one row of each weight matrix; sums are fp32.
"""

import triton
import triton.language as tl

from moe_tools.kernels.triton.rows import load_rows_ND


@triton.jit
def expert_of(neuron_N, F, E):
    """Finds the expert of each neuron: slices of F // E, the first F mod E of them one longer."""
    size = F // E
    longer = F % E
    edge = longer * (size + 1)
    return tl.where(neuron_N < edge, neuron_N // (size + 1), longer + (neuron_N - edge) // size)


@triton.jit
def load_weight_TN(mask, token_T, neuron_N, on_N, T, F, E):
    """Loads the mask of each neuron's expert for each token; 1 without a mask, 0 outside."""
    inside_TN = (token_T < T)[:, None] & on_N[None, :]
    if mask is None:
        return inside_TN.to(tl.float32)
    else:
        expert_N = expert_of(neuron_N, F, E)
        at_TN = token_T[:, None].to(tl.int64) * E + expert_N[None, :]
        return tl.load(mask + at_TN, mask=inside_TN, other=0).to(tl.float32)


@triton.jit
def load_x_TD(x, token_T, column_D, T, D):
    """Loads a tile of x, or of dy, which is laid out as x is."""
    inside_TD = (token_T < T)[:, None] & (column_D < D)[None, :]
    at_TD = token_T[:, None].to(tl.int64) * D + column_D[None, :]
    return tl.load(x + at_TD, mask=inside_TD, other=0.0)


@triton.jit
def load_N(numbers, neuron_N, on_N):
    """Loads one number of each neuron, such as its bias."""
    return tl.load(numbers + neuron_N, mask=on_N, other=0.0).to(tl.float32)


@triton.jit
def with_bias_TN(product_TN, bias, neuron_N, on_N):
    """Adds the bias of each neuron, if there is one."""
    if bias is not None:
        product_TN += load_N(bias, neuron_N, on_N)[None, :]
    return product_TN


@triton.jit
def neuron_major(tokens, neuron_N, F, BLOCK_T: tl.constexpr):
    """Says where values_TN stand: a neuron's BLOCK_T values together, at the neuron's own place."""
    row_N = (tokens * F + neuron_N).to(tl.int64) * BLOCK_T
    return row_N[None, :] + tl.arange(0, BLOCK_T)[:, None]


@triton.jit
def no_sums(BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Makes the zeros that `add_product` adds to: one token is summed across columns at the end."""
    if BLOCK_T == 1:
        return tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        return tl.zeros((BLOCK_T, BLOCK_N), tl.float32)


@triton.jit
def add_product(sums, x_TD, rows_ND, BLOCK_T: tl.constexpr):
    """Returns sums + x rows^T: fused multiply-adds for one token, matrix units for more."""
    if BLOCK_T == 1:
        return sums + x_TD.to(tl.float32) * rows_ND.to(tl.float32)
    else:
        rows_DN = tl.trans(rows_ND.to(x_TD.dtype))
        return tl.dot(x_TD, rows_DN, sums, input_precision="ieee")


@triton.jit
def product_TN(sums, BLOCK_T: tl.constexpr):
    """Turns the sums into one value for each token and neuron."""
    if BLOCK_T == 1:
        return tl.sum(sums, axis=1)[None, :]
    else:
        return sums


@triton.jit
def project_TN(
    x, dy, gate, gate_scale, gate_stride, up, up_scale, up_stride, down, down_stride,
    token_T, neuron_N, row_N, on_N, T, D,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OFFSET: tl.constexpr = 0.0,
):  # fmt: skip
    """Computes gate x, up x and down dy in one pass over D; weights that are None are left out.

    `row_N` are the neurons' rows of gate and up; those of down follow each other. OFFSET is that
    of gate and up in few bits, see `rows.load_rows_ND`.
    """
    gate_sums = no_sums(BLOCK_T, BLOCK_N, BLOCK_D)
    up_sums = no_sums(BLOCK_T, BLOCK_N, BLOCK_D)
    down_sums = no_sums(BLOCK_T, BLOCK_N, BLOCK_D)
    for start in range(0, D, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D)
        if (gate is not None) or (up is not None):
            x_TD = load_x_TD(x, token_T, column_D, T, D)
        if gate is not None:
            gate_ND = load_rows_ND(
                gate, gate_scale, gate_stride, row_N, on_N, start, D, BLOCK_D, OFFSET
            )  # fmt: skip
            gate_sums = add_product(gate_sums, x_TD, gate_ND, BLOCK_T)
        if up is not None:
            up_ND = load_rows_ND(
                up, up_scale, up_stride, row_N, on_N, start, D, BLOCK_D, OFFSET
            )  # fmt: skip
            up_sums = add_product(up_sums, x_TD, up_ND, BLOCK_T)
        if down is not None:
            dy_TD = load_x_TD(dy, token_T, column_D, T, D)
            down_ND = load_rows_ND(
                down, None, down_stride, neuron_N, on_N, start, D, BLOCK_D, 0.0
            )  # fmt: skip
            down_sums = add_product(down_sums, dy_TD, down_ND, BLOCK_T)
    return (
        product_TN(gate_sums, BLOCK_T),
        product_TN(up_sums, BLOCK_T),
        product_TN(down_sums, BLOCK_T),
    )


@triton.jit
def sigmoid(a):
    """Computes 1 / (1 + exp(-a)) without an overflow on the way."""
    small = tl.exp(-tl.abs(a))
    return tl.where(a < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def activate(a, threshold, ACT: tl.constexpr):
    """Computes an activation of `kernels.activations`, by its name."""
    if ACT == "identity":
        return a
    elif ACT == "relu":
        return tl.where(a < 0.0, 0.0, a)
    elif ACT == "relu2":
        return tl.where(a < 0.0, 0.0, a * a)
    elif ACT == "fatrelu":
        return tl.where(a < threshold, 0.0, a)
    elif ACT == "shifted_relu":
        return tl.where(a < threshold, 0.0, a - threshold)
    elif ACT == "silu":
        return a * sigmoid(a)
    elif ACT == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "gelu_tanh", "unknown activation")
        return a * sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))


@triton.jit
def slope(a, threshold, ACT: tl.constexpr):
    """Computes an activation's derivative; at a kink it is PyTorch's."""
    if ACT == "identity":
        return tl.full(a.shape, 1.0, tl.float32)
    elif ACT == "relu":
        return tl.where(a > 0.0, 1.0, 0.0)
    elif ACT == "relu2":
        return tl.where(a > 0.0, 2.0 * a, 0.0)
    elif ACT == "fatrelu":
        return tl.where(a < threshold, 0.0, 1.0)
    elif ACT == "shifted_relu":
        return tl.where(a > threshold, 1.0, 0.0)
    elif ACT == "silu":
        on = sigmoid(a)
        return on * (1.0 + a * (1.0 - on))
    elif ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        return below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    else:
        tl.static_assert(ACT == "gelu_tanh", "unknown activation")
        on = sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        return on + a * on * (1.0 - on) * 1.5957691216057308 * (1.0 + 0.134145 * a * a)
