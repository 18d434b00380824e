"""An FFN's matrices, wherever in a model they are: what it computes, and a neuron a row.

Letters: T tokens, D model width, F neurons of one FFN, K neurons that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.activations import JointActivation, kernel_act, kernel_up_act
from moe_tools.hosts.layouts import Layout
from moe_tools.kernels.weights import FFNWeights

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a linear can be given. A quantised weight has another dtype than the numbers it takes."""


def hidden_TF(act: nn.Module, up_TF: Tensor, gate_TF: Tensor | None = None) -> Tensor:
    """h_TF of an FFN with the activation `act`, a host's or ours, from its rows."""
    if gate_TF is None:
        return act(up_TF)
    if isinstance(act, JointActivation):
        return act.join_TF(gate_TF, up_TF)
    return act(gate_TF) * up_TF


class Projections(NamedTuple):
    """The modules of an FFN that hold its weights, wherever in a model they now are."""

    gate: nn.Module | None
    """Equal to `up` when one linear holds gate rows, then up rows."""
    up: nn.Module
    act: nn.Module
    down: nn.Module
    hidden_dropout: nn.Module | None = None
    output_dropout: nn.Module | None = None
    casts_down: bool = False
    """See `Layout.casts_down`."""

    @classmethod
    def of(cls, layout: Layout, part: Callable[[str], nn.Module]) -> Projections:
        """The modules of an FFN: `part` gives each by its path in the layout."""
        paths = (layout.gate, layout.hidden_dropout, layout.output_dropout)
        gate, hidden, output = (None if path is None else part(path) for path in paths)
        assert layout.act is not None
        up, act, down = (part(path) for path in (layout.up, layout.act, layout.down))
        return cls(gate, up, act, down, hidden, output, layout.casts_down)

    def hidden_TF(self, x_TD: Tensor) -> Tensor:
        """h of every neuron, as the host computes it."""
        return hidden_TF(self.act, *self.rows_TF(x_TD))

    def project_TD(self, h_TF: Tensor) -> Tensor:
        """y_TD from h_TF, with the host's own dropouts and cast."""
        if self.hidden_dropout is not None:
            h_TF = self.hidden_dropout(h_TF)
        if self.casts_down and not torch.is_autocast_enabled(h_TF.device.type):
            h_TF = _as_weight(h_TF, self.down)
        y_TD: Tensor = self.down(h_TF)
        return y_TD if self.output_dropout is None else self.output_dropout(y_TD)

    def rows_TF(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the activation: up rows and, where there is a gate, gate rows."""
        if self.gate is self.up:
            gate_TF, up_TF = self.up(x_TD).chunk(2, dim=-1)
            return up_TF, gate_TF
        return self.up(x_TD), None if self.gate is None else self.gate(x_TD)

    def hidden_TK(self, x_TD: Tensor, neurons_K: Tensor) -> Tensor:
        """h of some neurons, whose rows alone are read; with adapters, all rows are."""
        weights = self.weights()
        whole = len(neurons_K) == len(weights.up_FD)  # then a copy of h, not of the rows
        if whole or not all(is_plain(linear) for linear in self.linears()):
            return self.hidden_TF(x_TD)[..., neurons_K]
        up_TK = _some_rows(x_TD, weights.up_FD, weights.up_F, neurons_K)
        if weights.gate_FD is None:
            return hidden_TF(self.act, up_TK)
        gate_TK = _some_rows(x_TD, weights.gate_FD, weights.gate_F, neurons_K)
        return hidden_TF(self.act, up_TK, gate_TK)

    def weights(self) -> FFNWeights:
        """Neuron-major views of the weights: writing to them writes to the host."""
        up_FD, up_F = _rows(self.up), _bias(self.up)
        gate_FD, gate_F = (
            (None, None) if self.gate is None else (_rows(self.gate), _bias(self.gate))
        )
        if self.gate is self.up:
            gate_FD, up_FD = up_FD.chunk(2)
            gate_F, up_F = (None, None) if up_F is None else up_F.chunk(2)
        return FFNWeights(
            up_FD,
            _rows(self.down).T,
            kernel_act(self.act) or self.act,
            gate_FD,
            up_F,
            gate_F,
            _bias(self.down),
            kernel_up_act(self.act),
        )

    def computed(self) -> FFNWeights:
        """The weights that the modules compute with: under an adapter or a quantiser, copies.

        The views of `weights` are then of what the adapter stands on.
        """
        made = self.weights()
        if not is_plain(self.up):
            rows = _computed_rows(self.up)
            gate_up = rows.chunk(2) if self.gate is self.up else (made.gate_FD, rows)
            made = replace(made, gate_FD=gate_up[0], up_FD=gate_up[1])
        if self.gate is not None and self.gate is not self.up and not is_plain(self.gate):
            made = replace(made, gate_FD=_computed_rows(self.gate))
        return made if is_plain(self.down) else replace(made, down_FD=_computed_rows(self.down).T)

    def linears(self) -> list[nn.Module]:
        """What holds the weights, each module once."""
        found = [self.gate, self.up, self.down]
        return list(dict.fromkeys(module for module in found if module is not None))


def _as_weight(h_TF: Tensor, linear: nn.Module) -> Tensor:
    """h in the dtype of a linear's weight, if that is one to compute in: int8 and fp8 are not."""
    dtype = linear.weight.dtype
    return h_TF.to(dtype) if dtype in COMPUTED else h_TF


def _some_rows(x_TD: Tensor, rows_FD: Tensor, bias_F: Tensor | None, chosen_K: Tensor) -> Tensor:
    bias_K = None if bias_F is None else bias_F[chosen_K]
    return nn.functional.linear(x_TD, rows_FD[chosen_K], bias_K)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear computes with the numbers of its weight: no adapter, not quantised."""
    if type(linear) not in (nn.Linear, Conv1D):  # a subclass may compute something else
        return False
    weight = linear.weight
    return type(weight) is nn.Parameter and weight.dtype in COMPUTED


def _computed_rows(module: nn.Module) -> Tensor:
    """(outputs, inputs) of any module that is affine, by the outputs for each unit vector."""
    weight = module.get_parameter("weight")
    width = weight.shape[0] if isinstance(_base(module), Conv1D) else weight.shape[1]
    dtype = weight.dtype if weight.dtype in COMPUTED else torch.float32
    units = torch.eye(width, dtype=dtype, device=weight.device)
    return (module(units) - module(torch.zeros_like(units[:1]))).T


def _base(module: nn.Module) -> nn.Module:
    """The linear below PEFT's adapters, which stand around it."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def _rows(module: nn.Module) -> Tensor:
    """The (outputs, inputs) view of a linear: Conv1D stores the transpose."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(_base(module), Conv1D) else weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
