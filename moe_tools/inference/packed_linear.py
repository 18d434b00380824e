"""Packs a model's linears for the native kernels: in their own dtype, or in eight or four bits.

Letters: T tokens (any leading dimensions), D columns, N rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_tools.experts.routers import Router
from moe_tools.hosts.input_threshold import threshold_of
from moe_tools.kernels.cpu.columns import CpuColumns
from moe_tools.kernels.cpu.linear import CpuLinear, own_rows
from moe_tools.kernels.cpu.rows import FLOATS
from moe_tools.kernels.quantize import INT4
from moe_tools.kernels.sparse_ffn import native_cpu

Kind = Literal["int8", "int4"]
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "int4": INT4}

_log = logging.getLogger(__name__)


class PackedLinear(nn.Linear):
    """A linear, y = x W^T + b, whose rows the native kernels read. It has no gradients.

    It is the host's own module of another class: name, hooks and parameters stay. In its own dtype
    `weight` is a view of what the kernels read; in fewer bits it is empty, and refuses to be saved.
    """

    packed: CpuLinear

    def forward(self, x_TD: Tensor) -> Tensor:
        """Computes y_TN, in the dtype of x.

        Raises:
            ValueError: a gradient is asked for.
        """
        if x_TD.requires_grad and torch.is_grad_enabled():
            raise ValueError("a packed linear has no gradients: call it under torch.no_grad()")
        return self.packed(x_TD)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the kernels read where the weight says it as well."""
        state = self.__dict__.copy()
        if self.weight.device.type != "meta":
            del state["packed"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs the weight anew where it was left out."""
        nn.Module.__setstate__(self, state)
        if "packed" not in state:
            self.pack(self.weight.dtype)

    def pack(self, dtype: torch.dtype) -> None:
        """Lets the kernels read the weight as `dtype`.

        In its own dtype it moves to where they read it best, and whoever shares it goes with it; in
        another one its numbers are freed.
        """
        self.packed = CpuLinear(self.weight, self.bias, dtype)
        if dtype == self.weight.dtype:
            self.weight.data = self.packed.weight_ND()
        else:
            self.weight = nn.Parameter(self.weight.detach().to("meta"), requires_grad=False)


class ColumnLinear(nn.Linear):
    """A linear whose inputs have a threshold: what meets a zero of x is not read.

    It is the host's own module of another class: name, hooks and parameters stay, and `weight` is a
    view of what the kernels read. It has no gradients.
    """

    columns: CpuColumns

    def forward(self, x_TD: Tensor) -> Tensor:
        """Computes y_TN, in the dtype of x.

        Raises:
            ValueError: a gradient is asked for.
        """
        if x_TD.requires_grad and torch.is_grad_enabled():
            raise ValueError("a packed linear has no gradients: call it under torch.no_grad()")
        return self.columns(x_TD)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the kernels read: the weight says it as well."""
        return {name: value for name, value in self.__dict__.items() if name != "columns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs the weight anew."""
        nn.Module.__setstate__(self, state)
        self.pack()

    def pack(self) -> None:
        """Lets the kernels read the columns; whoever shares the weight goes with it."""
        self.columns = CpuColumns(self.weight, self.bias, self.weight.dtype)
        self.weight.data = self.columns.weight_ND()


def pack_linears(
    model: nn.Module, kind: Kind | None = None, besides: Collection[nn.Module] = ()
) -> None:
    """Packs the plain linears of a model in place, but for routers and the modules `besides`.

    In their own dtype those are packed whose rows fill whole cache lines, as in every model that is
    not tiny; of those whose inputs have a threshold (TEAL) the columns. With a kind one warning
    says which linears stay and why: a subclass of nn.Linear, a Conv1D, or one that is quantized
    already.

    Args:
        model: on the CPU.
        kind: the bits to round to; None: none, the linears keep their dtype.
        besides: linears that stay as they are.

    Raises:
        ValueError: an unknown kind, no linear to round, no native kernels, or a linear that is not
            on the CPU or in another dtype than fp32, bf16 and fp16; nothing is changed then.
    """
    if kind is not None and kind not in DTYPES:
        raise ValueError(f"unknown linears {kind!r}; known: {', '.join(get_args(Kind))}")
    found: dict[str, nn.Linear] = {}
    reasons: Counter[str] = Counter()
    for name, module in _linears(model, besides):
        reason = _why_not(module)
        if reason is None and isinstance(module, nn.Linear):
            found[name] = module
        elif reason is not None:
            reasons[reason] += 1
    if kind is None:
        for linear in found.values():
            if not _is_own(linear):
                continue
            if _is_sparse(linear):
                linear.__class__ = ColumnLinear
                cast(ColumnLinear, linear).pack()
            else:
                _pack(linear, linear.weight.dtype)
        return
    why = "; ".join(f"{reason} ({count} linears)" for reason, count in reasons.items())
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear to quantize as {kind}: "
            f"{why or 'none outside the FFNs'}; leave `linears` out"
        )
    for name, linear in found.items():
        _check(name, linear.weight)
    if reasons:
        _log.warning("%s: linears that stay as they are: %s", type(model).__name__, why)
    for linear in found.values():
        _pack(linear, DTYPES[kind])
        linear.register_state_dict_pre_hook(_refuse)


def can_pack(model: nn.Module) -> bool:
    """Whether a model has linears that the kernels here can multiply by in their own dtype."""
    return any(
        _why_not(module) is None and _is_own(cast(nn.Linear, module))
        for _, module in _linears(model, ())
    )


def _is_own(linear: nn.Linear) -> bool:
    """Whether the kernels read a linear in its own dtype, in the place of its weight."""
    return own_rows(linear.weight) and bool(native_cpu())


def _is_sparse(linear: nn.Linear) -> bool:
    """Whether a threshold makes zeros of x; one that is turned back afterwards has none."""
    threshold = threshold_of(linear)
    return threshold is not None and threshold.rotation is None


def _pack(linear: nn.Linear, dtype: torch.dtype) -> None:
    linear.__class__ = PackedLinear
    cast(PackedLinear, linear).pack(dtype)


def _linears(
    model: nn.Module, besides: Collection[nn.Module]
) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Returns (path, module) of every linear that is in no router and not among `besides`."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    left = {id(part) for router in routers for part in router.modules()}
    left |= {id(module) for module in besides}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in left
    ]


def _why_not(linear: nn.Linear | Conv1D) -> str | None:
    """Returns why a linear is not packed; None when it is."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, no plain linear"
    if type(linear.weight) is not nn.Parameter:
        return f"the weight is a {type(linear.weight).__name__}, no plain parameter"
    return None


def _check(name: str, weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(f"{name} is on {weight.device}: linears are quantized on the CPU")
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {weight.dtype}: linears are quantized from fp32, bf16 and fp16; load the "
            "model in one of them"
        )
    if not native_cpu():
        raise ValueError(
            "linears in few bits need the native kernels: reinstall moe-tools where a C++17 "
            "compiler is, or leave `linears` out"
        )


def _refuse(module: nn.Module, prefix: str, keep_vars: Any) -> None:
    raise ValueError(
        f"{prefix.removesuffix('.')} is quantized, which lost digits: save the model that it was "
        "made from"
    )
