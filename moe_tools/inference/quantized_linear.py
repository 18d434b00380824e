"""Linears outside the FFNs in eight or four bits, for decoding: PyTorch's own weight-only kernels.

Letters: T tokens (any leading dimensions), D columns, N rows, G groups of 32 columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_tools.experts.routers import Router

Kind = Literal["int8", "int4"]
GROUP = 32
"""Columns that share a scale in int4."""
FEW = 8
"""Tokens up to which the eight-bit kernel is faster than widening the weights and a matrix product:
as measured on Zen 5, 2048 x 2048 in bf16 (LOG.md)."""


class QuantizedLinear(nn.Module, ABC):
    """y = x W^T + b with W in few bits; no gradients, and nothing to save."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TN, in the dtype of x."""
        y_TN = self.product(x_TD.reshape(-1, self.in_features))
        y_TN = y_TN if self.bias is None else y_TN + self.bias
        return y_TN.view(*x_TD.shape[:-1], self.out_features)

    @abstractmethod
    def product(self, x_TD: Tensor) -> Tensor:
        """x W^T of a matrix x."""


class Int8Linear(QuantizedLinear):
    """A scale a row, the largest entry at 127."""

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
        """x W^T; of many tokens, by widening the weights."""
        if len(x_TD) > FEW:
            return functional.linear(x_TD, self.weight.to(x_TD.dtype)) * self.scale_N
        made: Tensor = torch.ops.aten._weight_int8pack_mm(
            x_TD.contiguous(), self.weight, self.scale_N
        )
        return made


class Int4Linear(QuantizedLinear):
    """A scale for each 32 of a row, the largest entry at 7; prompts are slower than in bf16."""

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
        """x W^T."""
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TD.contiguous(), self.weight, GROUP, self.scales_GN2
        )
        return made


def _scale(weight: Tensor, largest: int) -> Tensor:
    """What puts the largest entry of the last dimension at `largest`, but for its own rounding."""
    scale = (weight.abs().amax(dim=-1).float() / largest).to(weight.dtype)
    return torch.where(scale > 0, scale, 1.0)


_KINDS: dict[Kind, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def quantize_linears(model: nn.Module, kind: Kind, besides: Collection[nn.Module]) -> None:
    """Replaces the plain linears of a model in place, but for routers and the ones given.

    In int4, linears of which 32 does not divide the columns or 16 the rows stay as they are.

    Raises:
        ValueError: an unknown kind, or a model that is not on the CPU.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown linears {kind!r}; known: {', '.join(get_args(Kind))}")
    left = {
        id(part)
        for module in model.modules()
        if isinstance(module, Router)
        for part in module.modules()
    }
    left |= {id(module) for module in besides}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in left and _fits(kind, module)
    ]
    for name, linear in found:
        if linear.weight.device.type != "cpu":
            raise ValueError(
                f"{name} is on {linear.weight.device}: linears are quantized on the CPU"
            )
    for name, linear in found:
        model.set_submodule(name, _KINDS[kind](linear))


def _fits(kind: Kind, linear: nn.Linear) -> bool:
    return kind == "int8" or not (linear.in_features % GROUP or linear.out_features % 16)


def _refuse(module: nn.Module, prefix: str, keep_vars: Any) -> None:
    raise ValueError(
        f"{prefix.removesuffix('.')} is quantized, which lost digits: save the model that it was "
        "made from"
    )
