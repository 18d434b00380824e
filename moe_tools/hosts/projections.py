"""An FFN's matrices, wherever in a model they are: what it computes, and a neuron a row.

Letters: T tokens, D model width, F neurons of one FFN, K neurons that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_tools.hosts.activations import HostOnly, JointActivation, kernel_act, kernel_up_act
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.linears import (
    WAY_OUT,
    bias_of,
    computed_rows,
    dtype_of,
    has_numbers,
    is_plain,
    numbers_of,
    outline,
    rows,
    tensors_of,
    widths,
)
from moe_tools.kernels.weights import FFNWeights


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
    interleaved: bool = False
    """See `Layout.interleaved`."""

    @classmethod
    def of(cls, layout: Layout, part: Callable[[str], nn.Module]) -> Projections:
        """The modules of an FFN: `part` gives each by its path in the layout."""
        paths = (layout.gate, layout.hidden_dropout, layout.output_dropout)
        gate, hidden, output = (None if path is None else part(path) for path in paths)
        act, flags = activation_of(layout, part), (layout.casts_down, layout.interleaved)
        return cls(gate, part(layout.up), act, part(layout.down), hidden, output, *flags)

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
            gate_TF, up_TF = self.halves(self.up(x_TD), dim=-1)
            return up_TF, gate_TF
        return self.up(x_TD), None if self.gate is None else self.gate(x_TD)

    def halves(self, fused: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
        """Views of the gate's and the up part of what one linear holds or computes for both."""
        if self.interleaved:
            gate, up = fused.unflatten(dim, (-1, 2)).unbind(dim + 1 if dim >= 0 else dim)
        else:
            gate, up = fused.chunk(2, dim)
        return gate, up

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

    @torch.no_grad()
    def of_neurons(self, neurons_K: Tensor, dtype: torch.dtype) -> Projections:
        """The FFN of some neurons alone: plain linears of copies, the host's own modules between.

        Adapters are in the copies. Where only the host computes h, the way down alone is copied.

        Args:
            neurons_K: which, in this order.
            dtype: of the copies of a quantised linear, whose codes do not say what it takes.

        Raises:
            ValueError: the weights are not in memory, or quantised and cannot be read.
        """
        if any(tensor.is_meta for linear in self.linears() for tensor in tensors_of(linear)):
            raise ValueError("its weights are not in memory, so that no neurons can be copied")
        weights = self.computed()
        down_DK = weights.down_FD.T[:, neurons_K]
        down = _linear(down_DK, weights.down_D, dtype_of(self.down) or dtype)
        if isinstance(self.act, HostOnly):
            return self._replace(down=down)
        up, gate = _cut(self.up, weights.up_FD, weights.up_F, neurons_K, dtype), None
        if self.gate is not None and weights.gate_FD is not None:
            gate = _cut(self.gate, weights.gate_FD, weights.gate_F, neurons_K, dtype)
        return self._replace(gate=gate, up=up, down=down)

    def weights(self) -> FFNWeights:
        """The weights below all adapters, a neuron a row: to read; of quantised linears, copies.

        Raises:
            ValueError: quantised linears whose numbers cannot be found.
        """
        return self._weights(rows)

    def views(self) -> FFNWeights:
        """The same, to write: what is written to them is written to the host.

        Raises:
            ValueError: quantised linears, whose codes nobody can reorder or change.
        """
        for linear in self.linears():
            if not has_numbers(linear):
                raise ValueError(
                    f"its {type(linear).__name__} is quantised, and cannot be changed: {WAY_OUT}"
                )
        return self._weights(rows)

    def computed(self) -> FFNWeights:
        """The weights that the modules compute with, adapters included: then copies.

        Raises:
            ValueError: as `weights`.
        """
        return self._weights(computed_rows)

    def _weights(self, read: Callable[[nn.Module], Tensor]) -> FFNWeights:
        up_FD, up_F = read(self.up), bias_of(self.up)
        gate_FD, gate_F = None, None
        if self.gate is self.up:
            gate_FD, up_FD = self.halves(up_FD)
            gate_F, up_F = (None, None) if up_F is None else self.halves(up_F)
        elif self.gate is not None:
            gate_FD, gate_F = read(self.gate), bias_of(self.gate)
        return FFNWeights(
            up_FD,
            read(self.down).T,
            kernel_act(self.act) or self.act,
            gate_FD,
            up_F,
            gate_F,
            bias_of(self.down),
            kernel_up_act(self.act),
        )

    @property
    def size(self) -> tuple[int, int]:
        """F and D, whatever the weights are kept as."""
        found = widths(self.down)
        assert found is not None
        return found

    @property
    def numbers(self) -> int:
        """How many weights the matrices have, whatever they are kept as."""
        return sum(map(numbers_of, self.linears()))

    def outline(self) -> Projections:
        """The same shapes without numbers, on the meta device."""
        made = {id(linear): outline(linear) for linear in self.linears()}
        gate = None if self.gate is None else made[id(self.gate)]
        return self._replace(gate=gate, up=made[id(self.up)], down=made[id(self.down)])

    def linears(self) -> list[nn.Module]:
        """What holds the weights, each module once."""
        found = [self.gate, self.up, self.down]
        return list(dict.fromkeys(module for module in found if module is not None))


def activation_of(layout: Layout, part: Callable[[str], nn.Module]) -> nn.Module:
    """The activation of an FFN, a module of the host or not."""
    if layout.act is not None:
        return part(layout.act)
    if layout.masked:
        return HostOnly()
    assert layout.function is not None
    return ACT2FN[layout.function]


def _as_weight(h_TF: Tensor, linear: nn.Module) -> Tensor:
    """h in the dtype of a linear's weight, if that is one to compute in: int8 and fp8 are not."""
    return h_TF.to(dtype_of(linear) or h_TF.dtype)


def _cut(
    linear: nn.Module,
    rows_FD: Tensor,
    bias_F: Tensor | None,
    chosen_K: Tensor,
    dtype: torch.dtype,
) -> nn.Linear:
    bias_K = None if bias_F is None else bias_F[chosen_K]
    return _linear(rows_FD[chosen_K], bias_K, dtype_of(linear) or dtype)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A plain linear of these numbers, which asks for no gradient."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made.eval()


def _some_rows(x_TD: Tensor, rows_FD: Tensor, bias_F: Tensor | None, chosen_K: Tensor) -> Tensor:
    bias_K = None if bias_F is None else bias_F[chosen_K]
    return nn.functional.linear(x_TD, rows_FD[chosen_K], bias_K)
