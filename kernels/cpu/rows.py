"""The rows of a matrix as the native kernels read them: whole cache lines, zeros behind column D.

Rows of int8 and int4 are codes in groups of 32 with a bf16 scale each (`few_bits.py`); the scales
stand in front of the codes, in lines of their own. csrc/dtype.h says the same to the kernels.

Letters: F rows, D columns, G groups, B bytes of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_tools.kernels.cpu.memory import LINE
from moe_tools.kernels.cpu.native import extension, isa_index
from moe_tools.kernels.few_bits import GROUP, FewBits, StoredBits, store_rows
from moe_tools.kernels.quantize import INT4

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of x and y."""
DTYPES = (*FLOATS, torch.int8, INT4)
"""The dtypes of stored weights, in the order of csrc/dtype.h."""
NAMES = [str(dtype) for dtype in DTYPES]
"""The same by name: torch.export cannot write down int4."""
BITS: dict[torch.dtype, StoredBits] = {torch.int8: 8, INT4: 4}
"""The bits of those in groups."""
AT_ONCE = 1024
"""Rows that are quantized at once: the search for scales takes some copies of them in fp32."""

Order = Literal["multiplied", "added"]
"""How the codes of int4 lie in a line: as those of rows that are multiplied with x, or of rows that
are added to y. All others have one order."""


def per_line(dtype: torch.dtype) -> int:
    """Returns how many numbers a cache line holds."""
    return LINE * 2 if dtype == INT4 else LINE // dtype.itemsize


def line_count(width: int, dtype: torch.dtype) -> int:
    """Returns the cache lines that hold the numbers of a row."""
    return -(-width // per_line(dtype))


def scale_bytes(width: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the lines of scales in front of a row."""
    if dtype not in BITS:
        return 0
    scales = line_count(width, dtype) * per_line(dtype) // GROUP * 2
    return -(-scales // LINE) * LINE


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a row."""
    return scale_bytes(width, dtype) + line_count(width, dtype) * LINE


def as_floats(bias_N: Tensor | None) -> Tensor | None:
    """Returns a bias as the kernels read it."""
    return None if bias_N is None else bias_N.detach().float().contiguous()


def check_x(x_TD: Tensor, width: int, what: str) -> None:
    """Checks what meets rows of some width.

    Raises:
        ValueError: another width, dtype or device.
    """
    if x_TD.shape[-1:] != (width,) or x_TD.dtype not in FLOATS or not x_TD.is_cpu:
        raise ValueError(
            f"x_TD is {tuple(x_TD.shape)}, {x_TD.dtype} on {x_TD.device}: this {what} takes "
            f"{width} columns in fp32, bf16 or fp16 on the CPU"
        )


def write_rows(
    rows_FB: Tensor, matrix_FD: Tensor, dtype: torch.dtype, order: Order = "multiplied"
) -> None:
    """Writes a matrix as rows into bytes that are zero; int8 and int4 are rounded to their grid."""
    if dtype not in BITS:
        rows_FB.view(dtype)[:, : matrix_FD.shape[1]] = matrix_FD
        return
    for begin in range(0, len(rows_FB), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        write_codes(rows_FB[part], store_rows(matrix_FD[part], BITS[dtype]), dtype, order)


def write_codes(
    rows_FB: Tensor, few: FewBits, dtype: torch.dtype, order: Order = "multiplied"
) -> None:
    """Writes rows in few bits; copies of fewer than four are written as int4."""
    width = few.codes_FD.shape[1]
    before = scale_bytes(width, dtype)
    scales_FB = few.scale_FG.contiguous().view(torch.uint8)
    rows_FB[:, : scales_FB.shape[1]] = scales_FB
    if dtype == INT4:
        rows_FB[:, before:] = _nibbles(few.codes_FD, order)
    else:
        rows_FB[:, before : before + width] = few.codes_FD.view(torch.uint8)


def read_rows(
    rows_FB: Tensor,
    width: int,
    dtype: torch.dtype,
    order: Order = "multiplied",
    *,
    offset: float = 0.0,
) -> Tensor:
    """Returns the numbers of rows: in fp32, or a view where they are stored as floats.

    The offset is that of `FewBits`.
    """
    if dtype not in BITS:
        return rows_FB.view(dtype)[:, :width]
    before, groups = scale_bytes(width, dtype), -(-width // GROUP)
    scale_FG = rows_FB[:, : 2 * groups].contiguous().view(torch.bfloat16)
    codes_FB = rows_FB[:, before:]
    codes_FD = _codes(codes_FB, order) if dtype == INT4 else codes_FB.view(torch.int8)
    return FewBits(codes_FD[:, :width], scale_FG, BITS[dtype], offset).values_FD()


def rows_as(
    rows_FB: Tensor,
    width: int,
    dtype: torch.dtype,
    to: torch.dtype,
    order: Order = "multiplied",
    *,
    offset: float = 0.0,
    isa: str | None = None,
) -> Tensor:
    """Returns what `read_rows` does, as `to`: for codes by the kernels, in a tenth of the time.

    Args:
        rows_FB: may lie apart.
        width: the columns.
        dtype: of the rows.
        to: fp32, bf16 or fp16; a view where the rows are stored so.
        order: of the rows.
        offset: that of `FewBits`.
        isa: one of `isas()`; by default the fastest that this CPU runs.
    """
    if dtype not in BITS:
        return read_rows(rows_FB, width, dtype).to(to)
    made_FD = torch.empty(len(rows_FB), width, dtype=to)
    extension().read_rows(
        threads=torch.get_num_threads(),
        rows=rows_FB.data_ptr(),
        stride=rows_FB.stride(0),
        count=len(rows_FB),
        stored=DTYPES.index(dtype),
        width=width,
        lines=line_count(width, dtype),
        zero=8 - offset,
        added=int(order == "added"),
        dtype=DTYPES.index(to),
        to=made_FD.data_ptr(),
        isa=isa_index(isa),
    )
    return made_FD


def _nibbles(codes_FD: Tensor, order: Order) -> Tensor:
    """Packs codes, plus 8 each: two to a byte, 128 to a line."""
    padded_FD = pad(codes_FD, (0, -codes_FD.shape[1] % per_line(INT4)))
    numbers = (padded_FD + 8).to(torch.uint8)
    if order == "multiplied":  # byte i of a line holds numbers i and 64 + i
        low, high = numbers.view(len(numbers), -1, 2, LINE).unbind(2)
        return (low | high << 4).flatten(1)
    # word i of a line holds numbers i, 16 + i, ..., four bits each
    pairs = numbers.view(len(numbers), -1, 4, 2, 16)
    return (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).transpose(2, 3).flatten(1)


def _codes(bytes_FB: Tensor, order: Order) -> Tensor:
    if order == "multiplied":
        lines = bytes_FB.reshape(len(bytes_FB), -1, 1, LINE)
        numbers = torch.cat([lines & 15, lines >> 4], dim=2)
    else:
        lines = bytes_FB.reshape(len(bytes_FB), -1, 16, 4).transpose(2, 3)
        numbers = torch.stack([lines & 15, lines >> 4], dim=3)
    return numbers.flatten(1).to(torch.int8) - 8
