"""A quantised linear that needs no quantiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_tools.hosts.ffn import find_ffns


class CodedLinear(nn.Linear):
    """Stands for a quantised linear: its weight holds codes, its forward pass decodes them."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        self.scale = linear.weight.detach().abs().amax() / largest
        codes = linear.weight.detach() / self.scale
        codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD, self.weight.to(x_TD.dtype) * self.scale, self.bias)


def quantise_ffns(model: nn.Module, dtype: torch.dtype = torch.int8) -> None:
    """Puts coded linears in the place of every FFN's own, in place."""
    linears = {id(linear) for ffn in find_ffns(model) for linear in ffn.projections.linears()}
    for path, module in list(model.named_modules()):
        if id(module) in linears:
            assert isinstance(module, nn.Linear)
            model.set_submodule(path, CodedLinear(module, dtype))
