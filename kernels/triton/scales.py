"""Turns codes of eight and four bits into numbers: each 32 columns of a row share a scale.

Letters: D columns of one step, N neurons of one program, G groups of 32 columns, W columns of one
group.
"""

import triton
import triton.language as tl


@triton.jit
def scaled_ND(
    codes_ND, scale, row_N, on_N, start, D, BLOCK_D: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """Returns (code + OFFSET) * scale, in fp32.

    Codes are seen group by group, which moves none: only the few scales change their threads.
    """
    W: tl.constexpr = BLOCK_D if BLOCK_D < 32 else 32
    GROUPS: tl.constexpr = BLOCK_D // W
    G = tl.cdiv(D, 32)
    group_G = start // 32 + tl.arange(0, GROUPS)
    inside_NG = on_N[:, None] & (group_G < G)[None, :]
    at_NG = row_N[:, None].to(tl.int64) * G + group_G[None, :]
    scale_NG = tl.load(scale + at_NG, mask=inside_NG, other=0.0).to(tl.float32)
    codes_NGW = tl.reshape(codes_ND, (codes_ND.shape[0], GROUPS, W)).to(tl.float32)
    return tl.reshape((codes_NGW + OFFSET) * scale_NG[:, :, None], (codes_ND.shape[0], BLOCK_D))
