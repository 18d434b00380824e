"""The native CPU backend.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts, P parts of a
neuron: its rows of gate (if any), up and down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act, named
from moe_tools.kernels.cpu.dense import dense_ffn
from moe_tools.kernels.cpu.limits import Limits, limits_for
from moe_tools.kernels.cpu.native import extension, isas
from moe_tools.kernels.cpu.rows import PackedRows, pack_rows
from moe_tools.kernels.cpu.screen import Screen, make_screen, no_screen
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import INT4
from moe_tools.kernels.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, INT4)
"""Of weights, in the order of csrc/dtype.h; x and y may have the first three."""


class CpuFFN(PackedFFN):
    """Reads the rows of the experts that some token wants and, behind a gate that is zero, no more.

    An expert that is off contributes nothing, whatever its weights: not even 0 * infinity. Sums
    are in fp32; of more than a few tokens, h is rounded to bf16 where the weights are, as a matrix
    product would. The result depends on the number of threads, not on their timing.

    Args:
        weights: copied; the dense path reads the original where that has the dtype of the copy.
            After a change of the weights, pack again.
        sole: hold on to none of them: the dense path, too, reads the copy.
        dtype: of the copy: fp32, bf16, fp16, int8 with one scale a row, or int4 with one scale for
            each 32 of a row.
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
        self.rows = pack_rows(weights, dtype)
        super().__init__(_views(weights, self.rows, self.rows.stored_FD))
        self.screen = None if screen is None else make_screen(self.rows, screen)
        self.or_dense = or_dense
        keep = or_dense and not sole and weights.up_FD.dtype == dtype
        self._original = weights if keep else None
        self._native = extension()
        self._isa = _isa_index(isa)
        self._handle = self._native.prepare(*_describe(self.weights, self.rows, self.screen))

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.rows.bytes_FPB.device

    def rows_read(self, x_TD: Tensor, mask_TE: Tensor | None = None) -> int:
        """Rows of weights that a call reads if no matrix product is faster, without the screen's.

        Every group of at most 16 (few) or 256 (many) tokens reads for itself.

        Raises:
            ValueError: arguments that do not fit, or a soft mask.
        """
        self.weights.check_call(x_TD, mask_TE)
        _check_kinds(x_TD, mask_TE, soft=False)
        limits = self._limits(x_TD).without_dense()
        return self._call(x_TD, mask_TE, _output(x_TD), limits)

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        _check_kinds(x_TD, mask_TE, soft=self.or_dense)
        if mask_TE is not None and mask_TE.dtype != torch.bool:
            return self._dense(x_TD, mask_TE)
        y_TD = _output(x_TD)
        read = self._call(x_TD, mask_TE, y_TD, self._limits(x_TD))
        return self._dense(x_TD, mask_TE) if read < 0 else y_TD

    def _limits(self, x_TD: Tensor) -> Limits:
        width = self.weights.width
        limits = limits_for(self.rows.dtype, x_TD.dtype, x_TD.numel() // width, width)
        return limits if self.or_dense else limits.without_dense()

    def _call(self, x_TD: Tensor, mask_TE: Tensor | None, y_TD: Tensor, limits: Limits) -> int:
        x_TD = x_TD.contiguous()  # both stay alive until the kernel is done
        mask_TE = None if mask_TE is None else mask_TE.contiguous()
        read: int = self._native.run(
            self._handle,
            self._isa,
            torch.get_num_threads(),
            x_TD.data_ptr(),
            DTYPES.index(x_TD.dtype),
            x_TD.numel() // self.weights.width,
            0 if mask_TE is None else mask_TE.data_ptr(),
            1 if mask_TE is None else mask_TE.shape[-1],
            y_TD.data_ptr(),
            *limits,
        )
        return read

    def _dense(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        with torch.no_grad():
            return dense_ffn(self._in(x_TD.dtype), x_TD, mask_TE)

    def _in(self, dtype: torch.dtype) -> FFNWeights:
        """The weights as `dtype`, as they were given if they had it."""
        if self._original is not None and self._original.up_FD.dtype == dtype:
            return self._original
        made = _views(self.weights, self.rows, lambda part: self.rows.matrix_FD(part, dtype))
        return made.changed(lambda rows_FD: rows_FD, lambda bias: bias.to(dtype))


def _output(x_TD: Tensor) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


def _check_kinds(x_TD: Tensor, mask_TE: Tensor | None, soft: bool) -> None:
    if x_TD.dtype not in DTYPES[:3] or not x_TD.is_cpu:
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


def unsupported(weights: FFNWeights, dtype: torch.dtype) -> str | None:
    """Why this backend cannot store these weights; None when it can."""
    if dtype not in DTYPES:
        return f"backend 'cpu' stores fp32, bf16, fp16, int8 and int4, not {dtype}"
    if not weights.up_FD.is_cpu:
        return f"backend 'cpu' runs on the CPU, the weights are on {weights.up_FD.device}"
    if not all(isinstance(act, Act) for _, _, act in weights.inputs):
        return "backend 'cpu' knows activations by name: give a name or an Act, not a function"
    return None


def _views(weights: FFNWeights, rows: PackedRows, matrix_FD: Callable[[int], Tensor]) -> FFNWeights:
    """`weights`, but with the matrices of the parts, and the biases that are stored."""
    *inputs, down_FD = (matrix_FD(part) for part in range(rows.bytes_FPB.shape[1]))
    biases = [None] * len(inputs) if rows.biases_FP is None else list(rows.biases_FP.unbind(1))
    gate_FD, gate_F = (inputs[0], biases[0]) if len(inputs) == 2 else (None, None)
    return replace(
        weights,
        up_FD=inputs[-1],
        down_FD=down_FD,
        gate_FD=gate_FD,
        up_F=biases[-1],
        gate_F=gate_F,
        down_D=rows.bias_D,
        off_F=rows.off_F,
    )


def _describe(
    weights: FFNWeights, rows: PackedRows, screen: Screen | None
) -> tuple[int | float, ...]:
    """The arguments of `prepare` in module.cpp."""
    tensors = (rows.bytes_FPB, rows.scales_FP, rows.biases_FP, rows.off_F, rows.down_D)
    neurons, parts, _ = rows.bytes_FPB.shape
    up_act = named(weights.up_act) if parts == 3 else Act("identity")
    acts = [act for act in (named(weights.act), up_act) if isinstance(act, Act)]
    screens = () if screen is None else (screen.rows_FB, screen.scale_F, screen.error_F)
    return (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(neurons, weights.width, rows.lines, parts - 1, DTYPES.index(rows.dtype)),
        *(value for act in acts for value in (act.code, act.threshold)),
        *((tensor.data_ptr() for tensor in screens) if screens else (0, 0, 0)),
        1.0 if screen is None else screen.reach,
    )


def _isa_index(isa: str | None) -> int:
    known = isas()
    if isa is None:
        return len(known) - 1
    if isa not in known:
        raise ValueError(f"unknown instruction set {isa!r}; this CPU runs: {', '.join(known)}")
    return known.index(isa)
