"""Reads weights; no other file does: `tools/resources.py` finds these loads by the file's name.

A row holds floats, or codes of eight or four bits with a scale for each 32 of them (`stored.py`),
which become numbers on their way to the product.

Letters: D columns of one step, N neurons of one program.
"""

import triton
import triton.language as tl

from moe_tools.kernels.triton.scales import scaled_ND


@triton.jit
def row_of(neuron_N, group, skip):
    """Finds the row of each neuron, where `skip` other rows follow every `group` neurons.

    So stand the gate rows of an MoE host's fused experts: an expert's, then as many up rows.
    """
    return neuron_N + neuron_N // group * skip


@triton.jit
def load_rows_ND(
    weight, scale, stride, row_N, on_N, start, D, BLOCK_D: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """Loads BLOCK_D columns of weight rows; the rows of neurons that are off are not read.

    Codes, which have a `scale`, stand for (code + OFFSET) times the scale of their group. Their
    rows are padded to `stride` bytes, a multiple of 16, whatever D is.
    """
    if scale is None:
        return load_ND(weight, stride, row_N, on_N, start + tl.arange(0, BLOCK_D), D, 0.0)
    else:
        if weight.dtype.element_ty == tl.uint8:
            codes_ND = load_halves_ND(weight, stride, row_N, on_N, start, BLOCK_D)
        else:
            byte_D = start + tl.arange(0, BLOCK_D)
            codes_ND = load_ND(weight, stride, row_N, on_N, byte_D, stride, 0)
        return scaled_ND(codes_ND, scale, row_N, on_N, start, D, BLOCK_D, OFFSET)


@triton.jit
def load_ND(weight, stride, row_N, on_N, column_D, D, other):
    """Loads a tile of rows as they are stored."""
    inside_ND = on_N[:, None] & (column_D < D)[None, :]
    at_ND = row_N[:, None].to(tl.int64) * stride + column_D[None, :]
    return tl.load(weight + at_ND, mask=inside_ND, other=other)


@triton.jit
def load_halves_ND(weight, stride, row_N, on_N, start, BLOCK_D: tl.constexpr):
    """Loads codes of four bits, two a byte, the first in its low half; a half is 8 + its code."""
    # not start // 2, of which the compiler would not know that it is a multiple of anything
    byte_D = start // BLOCK_D * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
    bytes_ND = load_ND(weight, stride, row_N, on_N, byte_D, stride, 0x88)
    first_ND, second_ND = (bytes_ND & 15).to(tl.int8), (bytes_ND >> 4).to(tl.int8)
    return tl.interleave(first_ND, second_ND) - 8
