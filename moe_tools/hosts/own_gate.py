"""The gate of a host's own experts, where it is not act(gate x) * up x: limits, offsets and others.

Letters: T tokens (any leading dimensions), F neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.hosts.activations import JointActivation


class OwnGate(JointActivation):
    """Calls the host's `_apply_gate` on gate and up rows, in the order in which the host has them.

    It holds what the host's module says (limits, its activation) and none of its weights. Gate and
    up rows of a neuron are all that its h needs: so some neurons may be asked for alone.
    """

    def __init__(self, fused: nn.Module, interleaved: bool) -> None:
        super().__init__()
        self._host = (_without_weights(fused),)  # in a tuple: nn.Module would register it
        self.interleaved = interleaved

    def forward(self, x_TF: Tensor) -> Tensor:
        """h_TF where every up row is 1: the part that the gate has in it."""
        return self.join_TF(x_TF, torch.ones_like(x_TF))

    def join_TF(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """h_TF."""
        if self.interleaved:
            rows_TF = torch.stack((gate_TF, up_TF), dim=-1).flatten(-2)
        else:
            rows_TF = torch.cat((gate_TF, up_TF), dim=-1)
        (host,) = self._host
        h_TF: Tensor = host._apply_gate(rows_TF)
        return h_TF

    def extra_repr(self) -> str:
        """The host's class, whose gate it is."""
        return type(self._host[0]).__name__


def _without_weights(fused: nn.Module) -> Any:
    """A module of the same class, attributes and children, without parameters and hooks."""
    bare = type(fused).__new__(type(fused))
    nn.Module.__init__(bare)
    empty = {*bare.__dict__, *HOOKED}
    bare.__dict__.update({name: of for name, of in fused.__dict__.items() if name not in empty})
    bare._modules = dict(fused._modules)
    return bare


HOOKED = ("forward", "_hf_hook", "_old_forward")
"""What accelerate writes on a module: functions that hold the module itself, weights and all."""
