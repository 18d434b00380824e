"""The native CPU backend: which FFNs it can store, and `CpuFFN`, which stores and runs one.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act, named
from moe_tools.kernels.cpu.ffn_rows import pack_rows
from moe_tools.kernels.cpu.op import operands, sparse_ffn_cpu
from moe_tools.kernels.cpu.rows import DTYPES, FLOATS
from moe_tools.kernels.cpu.screen import make_screen, no_screen
from moe_tools.kernels.cpu.stored import Kernel, StoredFFN
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.weights import FFNWeights


class CpuFFN(PackedFFN):
    """An FFN on the native kernels: they skip experts that are off, and what a zero gate hides.

    An expert that is off contributes nothing, whatever its weights: not even 0 * infinity. Sums
    are in fp32; of more than a few tokens, h is rounded to bf16 where the weights are, as a matrix
    product would. The result depends on the number of threads, not on their timing.

    Under torch.compile it is one operator, without a graph break, whose dense path reads the copy.
    A pickle holds what is stored and gives the same y bit by bit; on another CPU it takes the
    fastest instruction set there, unless `isa` names one. A deep copy is the FFN itself.

    Args:
        weights: copied; the dense path reads the original where that has the dtype of the copy.
            After a change of the weights, pack again.
        sole: hold on to none of them: the dense path, too, reads the copy.
        dtype: of the copy: fp32, bf16, fp16, or int8 and int4 with a scale for each 32 of a row.
            With these two, x is rounded to int8 in such groups, too, and products are of integers:
            some 0.4 % of a product's size (`group_int8`). With int4, h times a scale is rounded to
            bf16 where the CPU multiplies bf16.
        or_dense: go through matrix products where they are faster, and for soft masks.
        isa: one of `isas()`; by default the fastest that this CPU runs.
        screen: skip neurons that a copy of the gate in int8 says cannot fire, for few tokens; a
            margin in standard deviations of its error, or `inf` to miss none (`screen.py`).

    Raises:
        ValueError: an activation without a name, a dtype or an instruction set that is not there,
            or a gate that cannot be screened.
    """

    backend = "cpu"

    def __init__(
        self,
        weights: FFNWeights,
        dtype: torch.dtype,
        *,
        or_dense: bool = True,
        sole: bool = False,
        isa: str | None = None,
        screen: float | None = None,
    ) -> None:
        refusal = unsupported(weights, dtype)
        if refusal is None and screen is not None:
            refusal = no_screen(weights.act, dtype, screen)
        if refusal:
            raise ValueError(refusal)
        rows = pack_rows(weights, dtype)
        stored = StoredFFN(
            rows,
            *_acts(weights),
            screen=None if screen is None else make_screen(rows, screen),
            or_dense=or_dense,
            isa=isa,
        )
        keep = or_dense and not sole and weights.up_FD.dtype == dtype
        self._hold(stored, weights if keep else None)

    def _hold(self, stored: StoredFFN, original: FFNWeights | None) -> None:
        self._kernel = Kernel(stored, original)
        super().__init__(stored.weights(stored.rows.stored_FD))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what is stored, and the original where that is read: y stays, bit by bit."""
        return _unpickled, (self._kernel.stored, self._kernel.original)

    @property
    def kernel(self) -> Kernel:
        """What runs it."""
        return self._kernel

    @property
    def device(self) -> torch.device:
        """The CPU, as a device."""
        return self._kernel.stored.rows.bytes_FPB.device

    def rows_read(self, x_TD: Tensor, mask_TE: Tensor | None = None) -> int:
        """Returns how many rows of weights, without the screen's, a call reads on the kernels.

        Every group of at most 16 (few) or 256 (many) tokens reads for itself.

        Raises:
            ValueError: arguments that do not fit, or a soft mask.
        """
        self.weights.check_call(x_TD, mask_TE)
        _check_kinds(x_TD, mask_TE, soft=False)
        return self._kernel.rows_read(x_TD, mask_TE)

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        _check_kinds(x_TD, mask_TE, soft=self._kernel.stored.or_dense)
        if torch.compiler.is_compiling():
            return sparse_ffn_cpu(x_TD, mask_TE, **operands(self._kernel.stored))
        return self._kernel(x_TD, mask_TE)


def _unpickled(stored: StoredFFN, original: FFNWeights | None) -> CpuFFN:
    """Restores the FFN, on the kernels of this CPU, with rows that begin on lines and pages."""
    made = CpuFFN.__new__(CpuFFN)
    made._hold(stored.aligned(), original)
    return made


def unsupported(weights: FFNWeights, dtype: torch.dtype) -> str | None:
    """Returns why this backend cannot store these weights; None when it can."""
    if dtype not in DTYPES:
        return f"backend 'cpu' stores fp32, bf16, fp16, int8 and int4, not {dtype}"
    if not weights.up_FD.is_cpu:
        return f"backend 'cpu' runs on the CPU, the weights are on {weights.up_FD.device}"
    if not all(isinstance(act, Act) for _, _, act in weights.inputs):
        return "backend 'cpu' knows activations by name: give a name or an Act, not a function"
    return None


def _acts(weights: FFNWeights) -> tuple[Act, Act]:
    acts = named(weights.act), named(weights.up_act)
    first, second = (act for act in acts if isinstance(act, Act))
    return first, second


def _check_kinds(x_TD: Tensor, mask_TE: Tensor | None, soft: bool) -> None:
    if x_TD.dtype not in FLOATS or not x_TD.is_cpu:
        raise ValueError(
            f"x_TD is {x_TD.dtype} on {x_TD.device}: backend 'cpu' takes fp32, bf16 and fp16 on "
            "the CPU"
        )
    if mask_TE is None:
        return
    if not mask_TE.is_cpu:
        raise ValueError(f"mask_TE is on {mask_TE.device}: backend 'cpu' takes it on the CPU")
    if mask_TE.dtype != torch.bool and not soft:
        raise ValueError("backend 'cpu' runs experts or not: give a boolean mask_TE, not soft")
