"""The native CPU backend.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts, P parts of a neuron:
its rows of gate (if any), up and down.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act, named
from moe_tools.kernels.cpu.native import extension, isas
from moe_tools.kernels.cpu.rows import Rows, pack_rows
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Of weights, in the order of csrc/dtype.h; x and y may have the first three."""
TOKENS_THAT_SHARE = 16
"""Tokens for which a kernel reads the weights once. Beyond, a matrix product is faster."""
DENSE_ABOVE = 0.65
"""Share of the neurons that several tokens want at which a matrix product is as fast."""


class CpuFFN(PackedFFN):
    """Reads the rows of the experts that some token wants and, behind a gate that is zero, no more.

    An expert that is off contributes nothing, whatever its weights: not even 0 * infinity. Sums
    are in fp32. The result depends on the number of threads, not on their timing.

    Args:
        weights: copied.
        dtype: of the copy: fp32, bf16, fp16, or int8 with one scale a row.
        or_dense: go through matrix products where they are faster, and for soft masks.
        isa: one of `isas()`; by default the fastest that this CPU runs.

    Raises:
        ValueError: an activation without a name, a dtype or an instruction set that is not there.
    """

    backend = "cpu"

    def __init__(
        self,
        weights: FFNWeights,
        dtype: torch.dtype,
        *,
        or_dense: bool = True,
        isa: str | None = None,
    ) -> None:
        refusal = unsupported(weights, dtype)
        if refusal:
            raise ValueError(refusal)
        self.rows = pack_rows(weights, dtype)
        super().__init__(_views(weights, self.rows))
        self.or_dense = or_dense
        self._native = extension()
        self._isa = _isa_index(isa)
        self._handle = self._native.prepare(*_describe(self.weights, self.rows))

    def rows_read(self, x_TD: Tensor, mask_TE: Tensor | None = None) -> int:
        """Rows of weights that a call reads, every group of 16 tokens by itself."""
        self.weights.check_call(x_TD, mask_TE)
        return self._call(x_TD, mask_TE, torch.empty_like(x_TD.contiguous()), 1.0)

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        tokens = x_TD.numel() // self.weights.width
        hard = mask_TE is None or mask_TE.dtype == torch.bool
        if self.or_dense and (not hard or tokens > TOKENS_THAT_SHARE):
            return self._dense(x_TD, mask_TE)
        if not hard:
            raise ValueError("backend 'cpu' runs experts or not: give a boolean mask_TE, not soft")
        most = DENSE_ABOVE if self.or_dense and tokens > 1 else 1.0
        y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        read = self._call(x_TD, mask_TE, y_TD, most)
        return self._dense(x_TD, mask_TE) if read < 0 else y_TD

    def _call(self, x_TD: Tensor, mask_TE: Tensor | None, y_TD: Tensor, most: float) -> int:
        if x_TD.dtype not in DTYPES[:3] or not x_TD.is_cpu:
            raise ValueError(
                f"x_TD is {x_TD.dtype} on {x_TD.device}: backend 'cpu' takes fp32, bf16 and fp16 "
                "on the CPU"
            )
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
            most,
        )
        return read

    def _dense(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        with torch.no_grad():
            return sparse_ffn_reference(self._in(x_TD.dtype), x_TD, mask_TE)

    def _in(self, dtype: torch.dtype) -> FFNWeights:
        """The stored weights as `dtype`: views where they have it."""
        rows_FPD, scales_FP = self.rows.rows_FPD, self.rows.scales_FP
        rows_FPD = rows_FPD.to(dtype) if scales_FP is None else rows_FPD * scales_FP[..., None]
        made = _views(self.weights, replace(self.rows, rows_FPD=rows_FPD.to(dtype)))
        biases = {name: getattr(made, name) for name in ("up_F", "gate_F", "down_D")}
        return replace(
            made, **{name: b if b is None else b.to(dtype) for name, b in biases.items()}
        )


def unsupported(weights: FFNWeights, dtype: torch.dtype) -> str | None:
    """Why this backend cannot store these weights; None when it can."""
    if dtype not in DTYPES:
        return f"backend 'cpu' stores fp32, bf16, fp16 and int8, not {dtype}"
    if not weights.up_FD.is_cpu:
        return f"backend 'cpu' runs on the CPU, the weights are on {weights.up_FD.device}"
    if not all(isinstance(act, Act) for _, _, act in weights.inputs):
        return "backend 'cpu' knows activations by name: give a name or an Act, not a function"
    return None


def _views(weights: FFNWeights, rows: Rows) -> FFNWeights:
    """`weights`, but with the stored numbers."""
    *inputs, down_FD = rows.rows_FPD[..., : weights.width].unbind(1)
    biases = [None] * len(inputs) if rows.biases_FP is None else list(rows.biases_FP.unbind(1))
    gate_FD, gate_F = (inputs[0], biases[0]) if len(inputs) == 2 else (None, None)
    return replace(
        weights,
        up_FD=inputs[-1],
        down_FD=down_FD,
        gate_FD=gate_FD,
        up_F=biases[-1],
        gate_F=gate_F,
        down_D=rows.down_D,
    )


def _describe(weights: FFNWeights, rows: Rows) -> tuple[int | float, ...]:
    """The arguments of `prepare` in module.cpp."""
    tensors = (rows.rows_FPD, rows.scales_FP, rows.biases_FP, rows.down_D)
    neurons, parts, padded = rows.rows_FPD.shape
    up_act = named(weights.up_act) if parts == 3 else Act("identity")
    acts = [act for act in (named(weights.act), up_act) if isinstance(act, Act)]
    return (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(neurons, weights.width, padded, parts - 1, DTYPES.index(rows.rows_FPD.dtype)),
        *(value for act in acts for value in (act.code, act.theta)),
    )


def _isa_index(isa: str | None) -> int:
    known = isas()
    if isa is None:
        return len(known) - 1
    if isa not in known:
        raise ValueError(f"unknown instruction set {isa!r}; this CPU runs: {', '.join(known)}")
    return known.index(isa)
