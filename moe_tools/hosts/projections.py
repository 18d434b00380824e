"""An FFN's matrices, wherever in a model they are: what it computes, and a neuron a row.

Letters: T tokens, D model width, F neurons of one FFN, K neurons that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.activations import hidden_TF


@dataclass(frozen=True)
class Projections:
    """The modules of an FFN that hold its weights, wherever in a model they now are."""

    gate: nn.Module | None
    """The same module as `up` when one linear holds gate rows, then up rows."""
    up: nn.Module
    act: nn.Module
    down: nn.Module

    def hidden_TF(self, x_TD: Tensor) -> Tensor:
        """h of every neuron, as the host computes it."""
        return hidden_TF(self.act, *self.rows_TF(x_TD))

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

    def weights(self) -> Weights:
        """Neuron-major views of the weights."""
        return read_weights(self.gate, self.up, self.down)

    def computed(self) -> Weights:
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


def _some_rows(x_TD: Tensor, rows_FD: Tensor, bias_F: Tensor | None, chosen_K: Tensor) -> Tensor:
    bias_K = None if bias_F is None else bias_F[chosen_K]
    return nn.functional.linear(x_TD, rows_FD[chosen_K], bias_K)


@dataclass(frozen=True)
class Weights:
    """Views of an FFN's weights, a neuron a row. Writing to them writes to the host."""

    gate_FD: Tensor | None
    up_FD: Tensor
    down_FD: Tensor
    gate_F: Tensor | None
    up_F: Tensor | None
    down_D: Tensor | None
    """The bias of the down projection: added once, whatever is routed off."""

    def matrices(self) -> Iterator[Tensor]:
        """Gate, up and down."""
        for tensor in (self.gate_FD, self.up_FD, self.down_FD):
            if tensor is not None:
                yield tensor

    def per_neuron(self) -> Iterator[Tensor]:
        """Every tensor whose first dimension is the neuron."""
        for tensor in (self.gate_FD, self.up_FD, self.down_FD, self.gate_F, self.up_F):
            if tensor is not None:
                yield tensor

    @property
    def row_numbers(self) -> int:
        """Weights that computing h of one neuron reads."""
        return self.up_FD.shape[1] * (1 if self.gate_FD is None else 2)

    @property
    def routing_FD(self) -> Tensor:
        """The rows that decide when a neuron fires: gate rows when gated, else up rows."""
        return self.up_FD if self.gate_FD is None else self.gate_FD

    @property
    def down_norm_F(self) -> Tensor:
        """How much one unit of each neuron moves the output: ||column of W_down||."""
        return self.down_FD.detach().float().norm(dim=1)


def read_weights(gate: nn.Module | None, up: nn.Module, down: nn.Module) -> Weights:
    """Neuron-major views of three projections; `gate is up` means one fused linear."""
    up_rows, up_bias = _rows(up), _bias(up)
    gate_rows, gate_bias = (None, None) if gate is None else (_rows(gate), _bias(gate))
    if gate is up:
        gate_rows, up_rows = up_rows.chunk(2)
        if up_bias is not None:
            gate_bias, up_bias = up_bias.chunk(2)
    return Weights(gate_rows, up_rows, _rows(down).T, gate_bias, up_bias, _bias(down))


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear computes with the numbers of its weight: no adapter, not quantised."""
    if not isinstance(linear, nn.Linear | Conv1D):
        return False
    return type(linear.weight) is nn.Parameter


def _computed_rows(module: nn.Module) -> Tensor:
    """(outputs, inputs) of any module that is affine, by the outputs for each unit vector."""
    weight = module.get_parameter("weight")
    width = weight.shape[0] if isinstance(_base(module), Conv1D) else weight.shape[1]
    units = torch.eye(width, dtype=weight.dtype, device=weight.device)
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
