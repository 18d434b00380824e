"""Reads weights; no other file does: `tools/resources.py` finds these loads by the file's name.

Letters: D columns of one step, N neurons of one program.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(neuron_N, group, skip):
    """Finds the row of each neuron, where `skip` other rows follow every `group` neurons.

    So stand the gate rows of an MoE host's fused experts: an expert's, then as many up rows.
    """
    return neuron_N + neuron_N // group * skip


@triton.jit
def load_rows_ND(weight, stride, row_N, on_N, column_D, D):
    """Loads a tile of weight rows; the rows of neurons that are off are not read."""
    inside_ND = on_N[:, None] & (column_D < D)[None, :]
    at_ND = row_N[:, None].to(tl.int64) * stride + column_D[None, :]
    return tl.load(weight + at_ND, mask=inside_ND, other=0.0)
