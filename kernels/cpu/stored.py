"""Runs a stored FFN on the native kernels: every call into the compiled module is made here.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts, P parts of a
neuron: its rows of gate (if any), up and down; B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.dense import dense_ffn
from moe_tools.kernels.cpu.ffn_rows import PackedRows
from moe_tools.kernels.cpu.limits import Limits, limits_for
from moe_tools.kernels.cpu.memory import aligned
from moe_tools.kernels.cpu.native import address, extension, isa_index
from moe_tools.kernels.cpu.rows import BITS, DTYPES
from moe_tools.kernels.cpu.screen import Screen
from moe_tools.kernels.few_bits import group_int8
from moe_tools.kernels.weights import FFNWeights

AT_ONCE = 1024
"""Neurons whose codes are made floats at a time."""


@dataclass(frozen=True, eq=False)
class StoredFFN:
    """Everything that y depends on besides x and the mask; what pickle keeps, and the operator."""

    rows: PackedRows
    act: Act
    """The activation of the first part: gate, or up where there is no gate."""
    up_act: Act
    screen: Screen | None
    or_dense: bool
    """Whether matrix products run where they are faster, and for soft masks."""
    isa: str | None
    """The instruction set to run on; None is the fastest of this CPU."""

    def aligned(self) -> StoredFFN:
        """Returns the FFN with rows that begin on cache lines and pages, which a pickle loses."""
        rows, screen = self.rows, self.screen
        rows = replace(rows, bytes_FPB=aligned(rows.bytes_FPB))
        if screen is not None:
            screen = replace(screen, rows_FB=aligned(screen.rows_FB))
        return replace(self, rows=rows, screen=screen)

    def weights(self, matrix_FD: Callable[[int], Tensor]) -> FFNWeights:
        """Returns the FFN with the matrix that `matrix_FD` gives for each part, and its biases."""
        *inputs, down_FD = (matrix_FD(part) for part in range(self.rows.parts))
        biases_FP = self.rows.biases_FP
        biases = [None] * len(inputs) if biases_FP is None else list(biases_FP.unbind(1))
        gated = len(inputs) == 2
        return FFNWeights(
            inputs[-1],
            down_FD,
            self.act,
            gate_FD=inputs[0] if gated else None,
            up_F=biases[-1],
            gate_F=biases[0] if gated else None,
            down_D=self.rows.bias_D,
            up_act=self.up_act,
            off_F=self.rows.off_F,
        )

    def weights_as(self, dtype: torch.dtype) -> FFNWeights:
        """Returns the FFN with its numbers as floats."""
        made = self.weights(lambda part: self.rows.matrix_FD(part, dtype))
        return made.changed(lambda rows_FD: rows_FD, lambda bias: bias.to(dtype))

    def prepare(self) -> object:
        """Returns a handle of the compiled module, which holds addresses and keeps no tensor."""
        rows, screen = self.rows, self.screen
        return extension().prepare(
            rows_FPB=rows.bytes_FPB.data_ptr(),
            biases_FP=address(rows.biases_FP),
            off_F=address(rows.off_F),
            down_D=address(rows.down_D),
            neurons=len(rows.bytes_FPB),
            width=rows.width,
            lines=rows.lines,
            gated=rows.parts == 3,
            dtype=DTYPES.index(rows.dtype),
            act=self.act.code,
            threshold=self.act.threshold,
            up_act=self.up_act.code,
            up_threshold=self.up_act.threshold,
            screen_FB=0 if screen is None else screen.rows_FB.data_ptr(),
            screen_scale_F=0 if screen is None else screen.scale_F.data_ptr(),
            screen_error_F=0 if screen is None else screen.error_F.data_ptr(),
            screen_reach=1.0 if screen is None else screen.reach,
            isa=isa_index(self.isa),
        )


class Kernel:
    """Runs a stored FFN.

    Args:
        stored: the FFN; the kernel keeps it.
        original: the weights that it was made from, if matrix products are to read these.
    """

    def __init__(self, stored: StoredFFN, original: FFNWeights | None = None) -> None:
        self.stored, self.original = stored, original
        self._width = stored.rows.width
        self._native = extension()
        self.handle = stored.prepare()

    def __call__(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        """Computes y_TD, in the dtype of x, from arguments that fit."""
        if mask_TE is not None and mask_TE.dtype != torch.bool:
            return self._dense(x_TD, mask_TE)
        return self.run(x_TD, mask_TE, self._limits(x_TD))

    def run(self, x_TD: Tensor, mask_TE: Tensor | None, limits: Limits) -> Tensor:
        """Computes y_TD in the way that some limits choose; the mask is of booleans."""
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        read = self._call(x_TD, mask_TE, y_TD, limits)
        return self._dense(x_TD, mask_TE) if read < 0 else y_TD

    def rows_read(self, x_TD: Tensor, mask_TE: Tensor | None) -> int:
        """Returns how many rows of weights a call reads if no matrix product is faster."""
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        return self._call(x_TD, mask_TE, y_TD, self._limits(x_TD).without_dense())

    def _limits(self, x_TD: Tensor) -> Limits:
        tokens = x_TD.numel() // self._width
        limits = limits_for(self.stored.rows.dtype, x_TD.dtype, tokens, self._width)
        return limits if self.stored.or_dense else limits.without_dense()

    def _call(self, x_TD: Tensor, mask_TE: Tensor | None, y_TD: Tensor, limits: Limits) -> int:
        x_TD = x_TD.contiguous()  # both stay alive until the kernel is done
        mask_TE = None if mask_TE is None else mask_TE.contiguous()
        read: int = self._native.run(
            self.handle,
            threads=torch.get_num_threads(),
            x_TD=x_TD.data_ptr(),
            dtype=DTYPES.index(x_TD.dtype),
            tokens=x_TD.numel() // self._width,
            mask_TE=0 if mask_TE is None else mask_TE.data_ptr(),
            experts=1 if mask_TE is None else mask_TE.shape[-1],
            y_TD=y_TD.data_ptr(),
            few=limits.few,
            most_few=limits.most_few,
            most_many=limits.most_many,
        )
        return read

    def _dense(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        with torch.no_grad():
            if self.stored.rows.dtype in BITS:
                return self._dense_in_slices(group_int8(x_TD), mask_TE)
            return dense_ffn(self._in(x_TD.dtype), x_TD, mask_TE)

    def _dense_in_slices(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        """Makes floats of some neurons at a time: they stay in the last cache. Sums are in fp32."""
        rows = self.stored.rows
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        experts = 1 if mask_TE is None else mask_TE.shape[-1]
        for some, neurons in _slices(len(rows.bytes_FPB), experts):
            own_TE = None if mask_TE is None else mask_TE[..., some]
            weights = replace(self.stored, rows=rows.of(neurons)).weights_as(x_TD.dtype)
            y_TD += dense_ffn(weights, x_TD, own_TE)
        return (y_TD if rows.bias_D is None else y_TD + rows.bias_D).to(x_TD.dtype)

    def _in(self, dtype: torch.dtype) -> FFNWeights:
        """Returns the weights as `dtype`: the original ones, if they have it."""
        if self.original is not None and self.original.up_FD.dtype == dtype:
            return self.original
        return self.stored.weights_as(dtype)


def _slices(neurons: int, experts: int) -> Iterator[tuple[slice, slice]]:
    """Yields whole experts and their neurons, about `AT_ONCE` at a time.

    The first F mod E experts have a neuron more, so that in each slice, too, the longer come first.
    """
    if experts == 1:
        for begin in range(0, neurons, AT_ONCE):
            yield slice(0, 1), slice(begin, min(begin + AT_ONCE, neurons))
        return
    size, longer = divmod(neurons, experts)
    step = max(1, AT_ONCE // max(size, 1))
    for first in range(0, experts, step):
        last = min(first + step, experts)
        begin, end = (one * size + min(one, longer) for one in (first, last))
        yield slice(first, last), slice(begin, end)
