"""The FFNs of a host: found, reordered, given another activation, replaced by ours.

`graft` puts our module in place of the host's, `host_state_dict` gives every tensor its host name
back.

Letters: T tokens (any leading dimensions), D model width, F neurons of one FFN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_tools.hosts.activations import Activation, JointActivation
from moe_tools.hosts.fused import check_fused, fused_experts
from moe_tools.hosts.host_expert import OneExpert, expert_views
from moe_tools.hosts.input_threshold import InputThreshold, thresholds_in
from moe_tools.hosts.layouts import Layout, child_name, holder_of, host_names, inside, join
from moe_tools.hosts.linears import tensors_of
from moe_tools.hosts.moe_host import HostExperts, unfuse_experts
from moe_tools.hosts.own_gate import OwnGate
from moe_tools.hosts.projections import Projections, activation_of
from moe_tools.hosts.rows import rows_of
from moe_tools.hosts.shapes import part_of
from moe_tools.kernels.weights import FFNWeights


@dataclass(frozen=True)
class FFN:
    """An FFN found in a dense model."""

    name: str
    """Path of the slot: the module that `graft` replaces."""
    layer: nn.Module
    """The module that holds every part: the host's, or ours where the activation is a joint one."""
    layout: Layout
    also: tuple[str, ...] = ()
    """Paths of other slots whose parts share these weights: our module replaces them as well."""

    def part(self, path: str) -> nn.Module:
        """One part, by its path in the layout."""
        if isinstance(self.layer, GraftedFFN):
            return self.layer.part(path)
        return part_of(self.layer, path)

    @property
    def act(self) -> nn.Module:
        """The activation."""
        return activation_of(self.layout, self.part)

    @property
    def down(self) -> nn.Module:
        """The down projection."""
        return self.part(self.layout.down)

    @property
    def projections(self) -> Projections:
        """What computes the hidden activations, and the way down."""
        return Projections.of(self.layout, self.part)

    @property
    def neurons(self) -> int:
        """F."""
        return self.projections.size[0]

    @property
    def width(self) -> int:
        """D."""
        return self.projections.size[1]

    def weights(self) -> FFNWeights:
        """The weights, a neuron a row, to read (`Projections.weights`)."""
        return self.projections.weights()

    def views(self) -> FFNWeights:
        """The weights, a neuron a row, to write.

        Raises:
            ValueError: they are quantised.
        """
        try:
            return self.projections.views()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


class Outline(FFN):
    """An FFN as shapes without numbers: what a router is built from whose numbers are in a file."""

    @property
    def projections(self) -> Projections:
        return super().projections.outline()


class GraftedFFN(nn.Module, ABC):
    """A module of ours in place of the host's: its own linears and activation, our forward pass.

    The children keep the host's names, so adapters and quantisers written for the host still find
    them.
    """

    done: ClassVar[str | None]
    """What has been done to it, after which nothing else can be; None: it is dense."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.name = ffn.name
        """Its path in the model."""
        self.also = ffn.also
        """Its other paths in the model, where modules of the host share their weights."""
        self.layout = ffn.layout
        self._names = {path: child_name(ffn.layout, path) for path in ffn.layout.moved()}
        for path, name in self._names.items():
            self.add_module(name, ffn.part(path))
        outside = [path for path in ffn.layout.parts() if path not in self._names]
        self._outside = {child_name(ffn.layout, path): ffn.part(path) for path in outside}
        """Parts that stay in the host: a dictionary, as they are no children of this module."""
        self._entering: list[Tensor] = []

    @abstractmethod
    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD."""

    def hidden(self, x_TD: Tensor) -> Tensor:
        """h_TF of every neuron, as the host computes it.

        Raises:
            ValueError: only the host knows (`Layout.masked`).
        """
        return self.projections.hidden_TF(x_TD)

    def listen(self) -> None:
        """Where the host computes h, lets this module see the x that the host gives to `up`."""
        if self.layout.masked:
            self._part(self.layout.up).register_forward_pre_hook(self._hear)

    def entered(self) -> Tensor:
        """x_TD of the pass that is on its way, once `listen` was called.

        Raises:
            ValueError: another library has replaced the linear that this module listens to.
        """
        if not self._entering:
            raise ValueError(
                f"{self.name}: its host's {self.layout.up} is not the linear that it was when the "
                "routers were attached: let transformers quantise it while it loads the folder"
            )
        return self._entering.pop()

    def _hear(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._entering[:] = args[:1]

    def weights(self) -> FFNWeights:
        """The weights, a neuron a row, to read (`Projections.weights`)."""
        return self.projections.weights()

    @property
    def projections(self) -> Projections:
        """The host's modules as they now are: an adapter or a quantiser may have replaced them."""
        return Projections.of(self.layout, self._part)

    @property
    def down(self) -> nn.Module:
        """The host's down projection."""
        return self._part(self.layout.down)

    @property
    def weight(self) -> Tensor:
        """The weight of the linear whose place this module has: some hosts look at its dtype.

        Raises:
            AttributeError: it has the place of a whole FFN.
        """
        if self.layout.slot not in self._names:
            raise AttributeError(f"{self.name} is no linear: it has no weight")
        return self._part(self.layout.slot).get_parameter("weight")

    @property
    def found(self) -> FFN:
        """This module as an FFN; its parts are looked up when they are used, adapters included."""
        return FFN(self.name, self, inside(self.layout))

    @property
    def renames(self) -> dict[str, str]:
        """Prefixes of our tensors -> the host's, where they differ."""
        names = [host_names(path, self.layout) for path in (self.name, *self.also)]
        return {ours: host for pairs in names for ours, host in pairs.items()}

    def added(self) -> list[str]:
        """Names of the tensors that it has beside those of the host: its router's, constants."""
        theirs = set(self._names.values())
        names: dict[str, Tensor] = {}
        self._save_to_state_dict(names, "", True)  # its own alone: a host's linears may repack
        for name, child in self.named_children():
            if name not in theirs:
                child.state_dict(destination=names, prefix=f"{name}.", keep_vars=True)
        return list(names)

    def part(self, name: str) -> nn.Module:
        """A part, by its name inside this module."""
        return self._outside[name] if name in self._outside else self.get_submodule(name)

    def exchange(self, old: nn.Module, new: nn.Module) -> None:
        """Takes note that a part outside of this module is another one now."""
        for name, part in self._outside.items():
            if part is old:
                self._outside[name] = new

    def _part(self, path: str) -> nn.Module:
        name = child_name(self.layout, path)
        module = self._outside.get(name, self._modules.get(name))
        assert module is not None
        return module


class SwappedFFN(GraftedFFN):
    """A dense FFN whose activation joins gate and up rows as no host does (`JointActivation`)."""

    done = None

    def __init__(self, ffn: FFN) -> None:
        assert not ffn.layout.slot  # so every part has its host name here, and is found again
        super().__init__(ffn)

    def forward(self, x_TD: Tensor) -> Tensor:
        projections = self.projections
        return projections.project_TD(projections.hidden_TF(x_TD))


def find_ffns(model: nn.Module) -> list[FFN]:
    """Finds the FFNs of a dense model, in the host's order, and changes nothing.

    The host's order is that of the forward pass, but for the shared expert of Qwen2-MoE, which
    runs before the others. Every expert of an MoE host is an FFN; where the host keeps them fused,
    their modules here are views: what is written to their weights is written to the model, but to
    hook or to replace them, use `unfused_ffns`.

    Raises:
        ValueError: the model has no FFN of a known family, or one whose parts were renamed; its
            FFNs are routed or optimised already, or it is an MoE host whose experts cannot be
            taken apart.
    """
    _check_dense(model)
    fused = fused_experts(model)
    stored = {path: check_fused(path, module) for path, module in fused.items()}
    rows = rows_of(model)
    found = []
    for path, module in model.named_modules():
        if path in fused:
            views = enumerate(expert_views(module, stored[path]))
            found += [FFN(f"{path}.{i}", view, view.layout) for i, view in views]
        elif isinstance(module, OneExpert | SwappedFFN):
            found.append(FFN(path, module, module.layout))
        elif path in rows:
            found.append(FFN(join(path, rows[path].slot), module, rows[path]))
    if not found:
        raise _unknown_host(model)
    return _joined(model, found)


def _joined(model: nn.Module, found: list[FFN]) -> list[FFN]:
    """One FFN for all modules that share their weights: it is grouped once, and has one router."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # while it loads, not tied yet
    by_weight: dict[int, FFN] = {}
    for ffn in found:
        name = f"{join(holder_of(ffn.name, ffn.layout), ffn.layout.up)}.weight"
        own = next(tensors_of(ffn.part(ffn.layout.up)))
        key = id(model.get_parameter(tied[name]) if name in tied else own)
        first = by_weight.get(key)
        by_weight[key] = ffn if first is None else replace(first, also=(*first.also, ffn.name))
    return list(by_weight.values())


def unfused_ffns(model: nn.Module) -> list[FFN]:
    """Finds the FFNs of a dense model as modules of it: fused experts are taken apart in place.

    Raises:
        ValueError: as `find_ffns`.
    """
    _check_dense(model)
    unfuse_experts(model)
    return find_ffns(model)


def _check_dense(model: nn.Module) -> None:
    for module in grafted_ffns(model):
        if module.done is not None:
            name = type(model).__name__
            raise ValueError(f"{name} is {module.done} already: start from the dense model")


def _unknown_host(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has no FFN that moe-tools can find: two linears with an "
        "activation between them, or three with a gate; docs/families.md has the families"
    )


@torch.no_grad()
def permute_neurons(ffn: FFN, order_F: Tensor) -> None:
    """Reorders the neurons in place: new neuron i is old neuron order_F[i]. y stays the same.

    Raises:
        ValueError: `order_F` is not a permutation of the neurons, or the weights are quantised.
    """
    weights, neurons = ffn.views(), ffn.neurons
    if not torch.equal(order_F.sort().values.cpu(), torch.arange(neurons)):
        raise ValueError(f"{ffn.name}: the order is not a permutation of its {neurons} neurons")
    for tensor in weights.per_neuron():
        tensor.copy_(tensor[order_F.to(tensor.device)])


@torch.no_grad()
def turn_neurons(ffn: FFN, signs_F: Tensor) -> None:
    """Multiplies up rows and down columns of a gated FFN by 1 or -1: no output changes, exactly.

    h = act(gate x) * up x changes its sign where the up row does, and the down column undoes it.

    Raises:
        ValueError: the weights are quantised.
    """
    weights = ffn.views()
    assert weights.gate_FD is not None  # without a gate, up x goes through the activation
    for tensor in (weights.up_FD, weights.up_F, weights.down_FD):
        if tensor is not None:
            tensor.mul_(signs_F.to(tensor).view(-1, *[1] * (tensor.dim() - 1)))


def set_activation(model: nn.Module, ffn: FFN, act: Activation) -> None:
    """Gives an FFN another activation, in place; its own forward pass stays, if it can.

    Raises:
        ValueError: as `check_activation`.
    """
    check_activation(ffn, act)
    assert ffn.layout.act is not None
    ffn.layer.set_submodule(ffn.layout.act, act.train(ffn.layer.training))
    if isinstance(act, JointActivation) and not isinstance(ffn.layer, SwappedFFN):
        graft(model, ffn, SwappedFFN(ffn))


def check_activation(ffn: FFN, act: Activation) -> None:
    """Whether an FFN can have an activation; changes nothing.

    Raises:
        ValueError: an activation that joins gate and up rows, and an FFN without a gate; one whose
            activation is no module.
    """
    if ffn.layout.act is None:
        raise ValueError(
            f"{ffn.name} has no module for its activation, which its host's code calls itself: it "
            "cannot be swapped"
        )
    if isinstance(ffn.act, OwnGate):
        raise ValueError(
            f"{ffn.name} has a gate that its host computes in its own way ({ffn.act}), whatever "
            "activation the config names: the host would load the folder with it again"
        )
    if isinstance(act, JointActivation) and ffn.layout.gate is None:
        raise ValueError(
            f"{ffn.name} has no gate, which {type(act).__name__} needs: use relu or fatrelu"
        )


def graft(model: nn.Module, ffn: FFN, module: nn.Module) -> None:
    """Puts `module` in the FFN's slot; parts that the host calls elsewhere become Identity."""
    for path in ffn.layout.bypass:
        _bypass(ffn.layer, path)
    if module.training != ffn.layer.training:  # some quantised linears refuse to be told at all
        module.train(ffn.layer.training)
    for name in (ffn.name, *ffn.also):
        model.set_submodule(name, module)
    if isinstance(module, GraftedFFN):
        module.listen()


def _bypass(holder: nn.Module, path: str) -> None:
    """Lets a holder hand on what it gets in place of calling a part, or of F.dropout."""
    parent, _, name = path.rpartition(".")
    owner = holder.get_submodule(parent)
    is_module = isinstance(getattr(owner, name), nn.Module)
    setattr(owner, name, nn.Identity() if is_module else 0.0)


def grafted_ffns(model: nn.Module) -> list[GraftedFFN]:
    """Our modules in a model, in the host's order."""
    return [module for module in model.modules() if isinstance(module, GraftedFFN)]


def stock_ffn_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors of every FFN of a stock model, as its own state dict has them."""
    rows = rows_of(model)
    prefixes = tuple(f"{path}." for path in fused_experts(model))
    for path, _ in model.named_modules():
        if path in rows:
            prefixes += tuple(f"{join(path, part)}." for part in rows[path].parts())
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def host_name(model: nn.Module) -> Callable[[str], str]:
    """What gives one of our tensors' names as the host has it."""
    renames = {ours: host for ffn in grafted_ffns(model) for ours, host in ffn.renames.items()}
    return lambda key: _rename(key, renames)


def host_state_dict(
    model: nn.Module, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict under the host's own names and shapes, our tensors beside.

    Tensors of ours have one name, also where modules of the host share their weights.

    Args:
        model: whose names they are.
        state: its tensors under our names, or the host's; by default its own state dict.
    """
    renamed_as = host_name(model)
    again = {
        f"{path}.{key}" for ffn in grafted_ffns(model) for path in ffn.also for key in ffn.added()
    }
    again |= _thresholds_again(model)
    given = model.state_dict() if state is None else state
    renamed = {renamed_as(key): given[key] for key in given if key not in again}
    for path, module in model.named_modules():
        if isinstance(module, HostExperts):
            module.fuse_into(renamed, path)
    return renamed


def _thresholds_again(model: nn.Module) -> set[str]:
    """Tensors of thresholds under every name but the first, where our module has several places."""
    first = thresholds_in(model)
    return {
        f"{path}.{key}"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, InputThreshold) and path not in first
        for key in module.state_dict()
    }


def read_host_names(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A `load_state_dict` pre-hook: tensors of `host_state_dict` get our names again, in place."""
    known = set(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, HostExperts):
            module.split_from(state, prefix + path)
    for ours, host in [pair for ffn in grafted_ffns(model) for pair in ffn.renames.items()]:
        for key in [key for key in state if key.startswith(prefix + host)]:
            name = ours + key.removeprefix(prefix + host)
            if key.removeprefix(prefix) not in known and name in known:
                state[prefix + name] = state.pop(key)


def _rename(key: str, renames: dict[str, str]) -> str:
    for ours, host in renames.items():
        if key.startswith(ours):
            return host + key.removeprefix(ours)
    return key
