"""Quantizes the linears outside the FFNs to eight or four bits, for PyTorch's weight-only kernels.

Letters: T tokens (any leading dimensions), D columns, N rows, G groups of 32 columns.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from moe_tools.experts.routers import Router

Kind = Literal["int8", "int4"]
GROUP, ROWS = 32, 16
"""Columns that share a scale in int4, and how many rows PyTorch packs together."""
FEW = 8
"""The most tokens for which the int8 kernel is faster than a matrix product of widened weights,
measured on Zen 5 with 2048 x 2048 in bf16 (LOG.md)."""

_log = logging.getLogger(__name__)


class QuantizedLinear(nn.Module, ABC):
    """A linear, y = x W^T + b, with W in few bits. It has no gradients and refuses to be saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]

    def forward(self, x_TD: Tensor) -> Tensor:
        """Computes y_TN, in the dtype of x."""
        y_TN = self.product(x_TD.reshape(-1, self.in_features))
        y_TN = y_TN if self.bias is None else y_TN + self.bias
        return y_TN.view(*x_TD.shape[:-1], self.out_features)

    @abstractmethod
    def product(self, x_TD: Tensor) -> Tensor:
        """Computes x W^T for a matrix x."""


class Int8Linear(QuantizedLinear):
    """A linear in int8: a scale a row, which puts the largest entry at 127."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_ND = linear.weight.detach()
        scale_N = _scale(weight_ND, 127)
        codes_ND = (weight_ND.float() / scale_N.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", codes_ND.to(torch.int8))
        self.register_buffer("scale_N", scale_N)
        self.weight: Tensor
        self.scale_N: Tensor

    def product(self, x_TD: Tensor) -> Tensor:
        """Computes x W^T; for many tokens, it widens the weights."""
        if len(x_TD) > FEW:
            return functional.linear(x_TD, self.weight.to(x_TD.dtype)) * self.scale_N
        made: Tensor = torch.ops.aten._weight_int8pack_mm(
            x_TD.contiguous(), self.weight, self.scale_N
        )
        return made


class Int4Linear(QuantizedLinear):
    """A linear in int4: a scale for each 32 of a row, which puts the largest entry at 7.

    It reads prompts more slowly than a linear in bf16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NGD = linear.weight.detach().unflatten(1, (-1, GROUP))
        scale_NG = _scale(weight_NGD, 7)
        codes_NGD = (weight_NGD.float() / scale_NG.float()[..., None]).round().clamp(-7, 7)
        codes_ND = codes_NGD.flatten(1).to(torch.int32) + 8
        self.register_buffer("weight", torch._convert_weight_to_int4pack_for_cpu(codes_ND, 1))
        scales_GN2 = torch.stack([scale_NG.T, torch.zeros_like(scale_NG.T)], dim=2)
        self.register_buffer("scales_GN2", scales_GN2.contiguous())
        self.weight: Tensor
        self.scales_GN2: Tensor

    def product(self, x_TD: Tensor) -> Tensor:
        """Computes x W^T."""
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TD.contiguous(), self.weight, GROUP, self.scales_GN2
        )
        return made


def _scale(weight: Tensor, largest: int) -> Tensor:
    """Returns the scale, in the dtype of the weight, with the largest entry / scale = `largest`."""
    scale = (weight.abs().amax(dim=-1).float() / largest).to(weight.dtype)
    return torch.where(scale > 0, scale, 1.0)


_KINDS: dict[Kind, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def quantize_linears(model: nn.Module, kind: Kind, besides: Collection[nn.Module]) -> None:
    """Replaces the plain linears of a model in place, but for routers and the modules `besides`.

    Linears that cannot be quantized stay, with one warning that says why: a subclass of nn.Linear,
    a Conv1D, one that is quantized already, and in int4 those of which 32 does not divide the
    columns or 16 the rows.

    Raises:
        ValueError: an unknown kind, no linear that can be quantized, or one that is not on the CPU
            or in another dtype than fp32, bf16 and fp16; nothing is changed then.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown linears {kind!r}; known: {', '.join(get_args(Kind))}")
    found: dict[str, nn.Linear] = {}
    reasons: Counter[str] = Counter()
    for name, module in _linears(model, besides):
        reason = _why_not(kind, module)
        if reason is None and isinstance(module, nn.Linear):
            found[name] = module
        elif reason is not None:
            reasons[reason] += 1
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
    for name, linear in found.items():
        model.set_submodule(name, _KINDS[kind](linear))


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


def _why_not(kind: Kind, linear: nn.Linear | Conv1D) -> str | None:
    """Returns why a linear is not quantized; None when it is."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, no plain linear"
    if type(linear.weight) is not nn.Parameter:
        return f"the weight is a {type(linear.weight).__name__}, no plain parameter"
    if kind == "int4" and (linear.in_features % GROUP or linear.out_features % ROWS):
        return f"int4 takes {GROUP}s of columns and {ROWS}s of rows"
    return None


def _check(name: str, weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(f"{name} is on {weight.device}: linears are quantized on the CPU")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is {weight.dtype}: linears are quantized from fp32, bf16 and fp16; load the "
            "model in one of them"
        )


def _refuse(module: nn.Module, prefix: str, keep_vars: Any) -> None:
    raise ValueError(
        f"{prefix.removesuffix('.')} is quantized, which lost digits: save the model that it was "
        "made from"
    )
