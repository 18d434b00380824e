"""One expert of an MoE host as an ordinary FFN, around views of the host's fused weights.

Letters: T tokens, D model width, F neurons of one expert, X experts of the host.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from moe_tools.hosts.fused import Storage
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.own_gate import OwnGate
from moe_tools.hosts.projections import Projections

_FUSED = Layout("gate_up_proj", "down_proj", "activation_fn", gate="gate_up_proj")


class OneExpert(nn.Module, ABC):
    """An expert of the host; its class says how it keeps its rows."""

    layout: ClassVar[Layout]

    def __init__(self, linears: Mapping[str, nn.Linear], act: nn.Module) -> None:
        super().__init__()
        *rows, down = linears
        for name in rows:
            self.add_module(name, linears[name])
        self.activation_fn = act
        self.add_module(down, linears[down])

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns y_TD of this expert."""
        parts = Projections.of(self.layout, self.get_submodule)
        return parts.project_TD(parts.hidden_TF(x_TD))


class HostExpert(OneExpert):
    """Gated: one linear holds gate rows, then up rows."""

    layout = _FUSED


class InterleavedExpert(OneExpert):
    """Gated: gate and up rows alternate in one linear."""

    layout = replace(_FUSED, interleaved=True)


class SeparateExpert(OneExpert):
    """Gated: gate and up rows are in two linears."""

    layout = Layout("up_proj", "down_proj", "activation_fn", gate="gate_proj")


class UngatedExpert(OneExpert):
    """Without a gate."""

    layout = Layout("up_proj", "down_proj", "activation_fn")


def expert_views(fused: nn.Module, storage: Storage) -> list[OneExpert]:
    """Every expert of a fused module as a module of its own, around views of the fused weights.

    All have one activation: the host's, or its own gate.
    """
    interleaved = storage.interleaved
    act = OwnGate(fused, interleaved) if storage.own_gate else fused.get_submodule(storage.act)
    kind = _kind(storage)
    views = _Views(fused, storage)
    return [kind(views.of(index), act) for index in range(views.experts)]


def _kind(storage: Storage) -> type[OneExpert]:
    if "gate_up_proj.weight" in storage.tensors:
        return InterleavedExpert if storage.interleaved else HostExpert
    return SeparateExpert if "gate_proj.weight" in storage.tensors else UngatedExpert


class _Views:
    """The linears of each expert."""

    def __init__(self, fused: nn.Module, storage: Storage) -> None:
        self.storage = storage
        self.fused = {ours: fused.get_parameter(host) for ours, host in storage.tensors.items()}

    @cached_property
    def experts(self) -> int:
        """The number of experts that compute something: those with a down projection."""
        return len(self.storage.each(self.fused["down_proj.weight"]))

    def of(self, index: int) -> dict[str, nn.Linear]:
        """Name -> linear of one expert."""
        names = dict.fromkeys(ours.rpartition(".")[0] for ours in self.fused)
        return {name: self._linear(name, index) for name in names}

    def _linear(self, name: str, index: int) -> nn.Linear:
        whole = self.fused[f"{name}.weight"]
        weight = self.storage.each(whole.detach())[index]
        weight = weight.T if self.storage.is_turned(f"{name}.weight") else weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
        biases = self.fused.get(f"{name}.bias")
        if biases is not None:
            linear.bias = nn.Parameter(biases.detach()[index], biases.requires_grad)
        return linear
