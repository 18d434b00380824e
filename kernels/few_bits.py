"""Weights in few bits: copies that propose neurons, and the grid on which weights are stored.

Groups of 32 columns share a bf16 scale s. A *copy* of B bits has the 2^B levels (k + 1/2) s, where
k goes from -2^(B-1) to 2^(B-1) - 1: no level is lost on 0, which is worth a lot at two and three
bits. *Stored* weights of B bits have the levels k s, k from -(2^(B-1) - 1) to 2^(B-1) - 1, as in
llama.cpp's Q8_0 and Q4_0. The high bits of stored weights are a copy of them: k >> (B - b) says in
which of 2^b intervals a weight lies, and stands for its middle. So who reads the high bits first
needs no second copy, and reads the low bits of the chosen rows alone.

Scales are searched: of some fractions of the scale that just holds the largest entry, each group
takes the one of the least squared error, weighed by the second moment of the inputs where that is
known, for the error of a product is sum_d x_d (w_d - w'_d).

Letters: D columns, F rows, G groups of a row, N = 32 columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32
"""Columns that share a scale, as in llama.cpp's Q4_0; as many as csrc/dtype.h says."""
SCALE_BITS = 16
"""A scale is a bf16 number."""
CopyBits = Literal[2, 3, 4, 8]
StoredBits = Literal[4, 8]

FRACTIONS: dict[int, tuple[float, ...]] = {
    2: (0.4, 0.46, 0.52, 0.58, 0.64, 0.7, 0.76, 0.82, 0.88, 0.94, 1.0),
    3: (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
    4: (0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
    8: (1.0,),
}
"""Bits -> scales that are tried, as shares of the scale that holds the largest entry."""


@dataclass(frozen=True)
class FewBits:
    """Rows in few bits: level = (code + offset) * scale."""

    codes_FD: Tensor
    """Whole numbers, int8."""
    scale_FG: Tensor
    """bf16, above 0."""
    bits: int
    offset: float = 0.0

    def values_FD(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for."""
        levels_FGN = groups(self.codes_FD.float()) + self.offset
        values_FGN = levels_FGN * self.scale_FG.float()[..., None]
        return values_FGN.flatten(1)[:, : self.codes_FD.shape[1]].to(dtype)

    def high_bits(self, bits: int) -> FewBits:
        """The copy that the highest `bits` of stored codes are.

        Raises:
            ValueError: it has no more bits than that, or is a copy itself.
        """
        spare = self.bits - bits
        if self.offset or spare < 1:
            raise ValueError(f"the highest {bits} of {self.bits} bits are no part of them")
        # Codes k 2^spare ... k 2^spare + 2^spare - 1 share their high bits k: the middle stands
        # for them, k + (2^spare - 1) / 2^(spare + 1) in steps of 2^spare.
        offset = (2**spare - 1) / 2 ** (spare + 1)
        return FewBits(self.codes_FD >> spare, self.scale_FG * 2**spare, bits, offset)


def copy_rows(weight_FD: Tensor, bits: CopyBits, moment_D: Tensor | None = None) -> FewBits:
    """A copy of rows that proposes; see above.

    Args:
        weight_FD: of any floating dtype.
        bits: 2, 3, 4 or 8.
        moment_D: mean of x_d^2 over the inputs; None: all alike.

    Raises:
        ValueError: other bits.
    """
    _check(bits, CopyBits)
    half = 2 ** (bits - 1)

    def code(scaled: Tensor) -> Tensor:
        return scaled.floor().clamp(-half, half - 1)

    return _searched(weight_FD, bits, moment_D, largest=half - 0.5, code=code, offset=0.5)


def store_rows(weight_FD: Tensor, bits: StoredBits, moment_D: Tensor | None = None) -> FewBits:
    """Rows as they are stored in 8 or 4 bits; rows that lie on such a grid already stay there.

    Args:
        weight_FD: of any floating dtype.
        bits: 8 or 4.
        moment_D: mean of x_d^2 over the inputs; None: all alike.

    Raises:
        ValueError: other bits.
    """
    _check(bits, StoredBits)
    top = 2 ** (bits - 1) - 1

    def code(scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-top, top)

    return _searched(weight_FD, bits, moment_D, largest=top, code=code, offset=0.0)


def bits_each(bits: int | None) -> float:
    """Bits of memory that one weight takes, its part of the scale included; None is bf16."""
    return 16.0 if bits is None else bits + SCALE_BITS / GROUP


def group_int8(x_TD: Tensor) -> Tensor:
    """x rounded to int8, a scale for each 32 numbers of a token; in the dtype of x."""
    x_TGN = groups(x_TD.float())
    most_TG1 = x_TGN.abs().amax(-1, keepdim=True)
    # not 127 / most, which PyTorch computes as 127 * (1 / most): the kernels divide
    inverse_TG1 = torch.where(most_TG1 > 0, torch.tensor(127.0) / most_TG1, 0.0)
    rounded_TGN = (x_TGN * inverse_TG1).round() * (most_TG1 / 127)
    return rounded_TGN.flatten(-2)[..., : x_TD.shape[-1]].to(x_TD.dtype)


def _searched(
    weight_FD: Tensor,
    bits: int,
    moment_D: Tensor | None,
    *,
    largest: float,
    code: Callable[[Tensor], Tensor],
    offset: float,
) -> FewBits:
    """For each group the fraction of its largest scale that errs least."""
    groups_FGN = groups(weight_FD.detach().float())
    most_FG1 = groups_FGN.abs().amax(-1, keepdim=True) / largest
    most_FG1 = torch.where(most_FG1 > 0, most_FG1, 1.0)
    moment_D = torch.ones_like(weight_FD[0]) if moment_D is None else moment_D
    weigh_GN = groups(moment_D.float())  # what pads a row weighs nothing
    best_FG1 = codes_FGN = error_FG1 = None
    for fraction in FRACTIONS[bits]:
        scale_FG1 = (most_FG1 * fraction).bfloat16().float()
        tried_FGN = code(groups_FGN / scale_FG1)
        lost_FGN = ((tried_FGN + offset) * scale_FG1 - groups_FGN).square()
        lost_FG1 = (lost_FGN * weigh_GN).sum(-1, keepdim=True)
        if best_FG1 is None or codes_FGN is None or error_FG1 is None:
            best_FG1, codes_FGN, error_FG1 = scale_FG1, tried_FGN, lost_FG1
            continue
        better = lost_FG1 <= error_FG1
        best_FG1 = torch.where(better, scale_FG1, best_FG1)
        codes_FGN = torch.where(better, tried_FGN, codes_FGN)
        error_FG1 = torch.where(better, lost_FG1, error_FG1)
    assert best_FG1 is not None and codes_FGN is not None
    codes_FD = codes_FGN.flatten(1)[:, : weight_FD.shape[1]].to(torch.int8)
    return FewBits(codes_FD, best_FG1.squeeze(-1).bfloat16(), bits, offset)


def groups(rows: Tensor) -> Tensor:
    """Splits the last dimension into (G, 32), with zeros behind column D."""
    return pad(rows, (0, -rows.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def _check(bits: int, known: object) -> None:
    choices: Sequence[int] = get_args(known)
    if bits not in choices:
        raise ValueError(f"bits is {bits!r}, but must be one of {', '.join(map(str, choices))}")
