"""Where each family keeps its FFNs: the only file that knows a host's names.

A family is a row of `LAYOUTS`. `find_ffns` reads the rows, `graft` puts our module in place of
the host's, `host_state_dict` gives every tensor its host name back.

Letters: D model width, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_tools.model.moe_host import HostExperts, unfuse_experts
from moe_tools.model.routing import routed_ffns


@dataclass(frozen=True)
class Layout:
    """The parts of an FFN, as paths below the host module that holds them all."""

    up: str
    down: str
    act: str
    gate: str | None = None
    """The GLU projection; the same path as `up` when one linear holds gate rows, then up rows."""
    hidden_dropout: str | None = None
    """Dropout between the activation and the down projection."""
    output_dropout: str | None = None
    """Dropout after the down projection, where the FFN itself applies it."""
    slot: str = ""
    """What our module replaces; empty: the holder itself."""
    bypass: tuple[str, ...] = ()
    """Parts the host calls outside the slot: they become Identity."""

    def parts(self) -> tuple[str, ...]:
        """Every path, each once, in the order of the forward pass."""
        paths = (self.gate, self.up, self.act, self.hidden_dropout, self.down, self.output_dropout)
        return tuple(dict.fromkeys(path for path in paths if path is not None))


_GATED = Layout(gate="gate_proj", up="up_proj", act="act_fn", down="down_proj")
_FUSED = Layout(gate="gate_up_proj", up="gate_up_proj", act="activation_fn", down="down_proj")
_BERT = Layout(
    up="intermediate.dense",
    act="intermediate.intermediate_act_fn",
    down="output.dense",
    slot="intermediate",
    bypass=("output.dense",),
)

LAYOUTS: dict[str, Layout] = {
    "LlamaMLP": _GATED,
    "MistralMLP": _GATED,
    "Qwen2MLP": _GATED,
    "Qwen3MLP": _GATED,
    "GemmaMLP": _GATED,
    "Gemma2MLP": _GATED,
    "Gemma3MLP": _GATED,
    "Phi3MLP": _FUSED,
    "HostExpert": _FUSED,
    "GPT2MLP": Layout(up="c_fc", act="act", down="c_proj", output_dropout="dropout"),
    "GPTNeoXMLP": Layout(up="dense_h_to_4h", act="act", down="dense_4h_to_h"),
    "OPTDecoderLayer": Layout(
        up="fc1", act="activation_fn", down="fc2", slot="fc1", bypass=("activation_fn", "fc2")
    ),
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "T5DenseActDense": Layout(up="wi", act="act", down="wo", hidden_dropout="dropout"),
    "T5DenseGatedActDense": Layout(
        gate="wi_0", up="wi_1", act="act", down="wo", hidden_dropout="dropout"
    ),
}
"""Class of the host module that holds an FFN -> where its parts are."""

FAMILIES = (
    "llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3 (text), phi3, gpt2, gpt_neox, opt, "
    "bert, roberta, t5, mixtral"
)


@dataclass(frozen=True)
class FFN:
    """An FFN found in a dense model and not yet changed."""

    name: str
    """Path of the slot: the module that `graft` replaces."""
    layer: nn.Module
    """The host module that holds every part."""
    layout: Layout

    def part(self, path: str) -> nn.Module:
        """One part, by its path in the layout."""
        return self.layer.get_submodule(path)

    @property
    def act(self) -> nn.Module:
        """The activation."""
        return self.part(self.layout.act)

    @property
    def down(self) -> nn.Module:
        """The down projection."""
        return self.part(self.layout.down)

    @property
    def projections(self) -> Projections:
        """What computes the hidden activations, and the way down."""
        gate = None if self.layout.gate is None else self.part(self.layout.gate)
        return Projections(gate, self.part(self.layout.up), self.act, self.down)

    def weights(self) -> Weights:
        """Neuron-major views of the weights."""
        return self.projections.weights()


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
        if self.gate is None:
            return self.act(self.up(x_TD))
        if self.gate is self.up:
            gate_TF, up_TF = self.up(x_TD).chunk(2, dim=-1)
        else:
            gate_TF, up_TF = self.gate(x_TD), self.up(x_TD)
        return self.act(gate_TF) * up_TF

    def hidden_TK(self, x_TD: Tensor, neurons_K: Tensor) -> Tensor:
        """h of some neurons, whose rows alone are read."""
        weights = self.weights()
        if len(neurons_K) == len(weights.up_FD):  # all of them: a copy of h, not of the rows
            return self.hidden_TF(x_TD)[..., neurons_K]
        up_TK = _some_rows(x_TD, weights.up_FD, weights.up_F, neurons_K)
        if weights.gate_FD is None:
            return self.act(up_TK)
        return self.act(_some_rows(x_TD, weights.gate_FD, weights.gate_F, neurons_K)) * up_TK

    def weights(self) -> Weights:
        """Neuron-major views of the weights."""
        return read_weights(self.gate, self.up, self.down)


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


def _rows(module: nn.Module) -> Tensor:
    """The (outputs, inputs) view of a linear: Conv1D stores the transpose."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs of a dense model, in forward order; an MoE host's experts are FFNs too.

    The fused experts of an MoE host are first taken apart in place (`unfuse_experts`).

    Raises:
        ValueError: the model has no FFN of a known family, or its FFNs are routed already.
    """
    if routed_ffns(model):
        raise ValueError(f"{type(model).__name__} is routed already: start from the dense model")
    unfuse_experts(model)
    found = []
    for path, module in model.named_modules():
        layout = LAYOUTS.get(type(module).__name__)
        if layout is not None:
            found.append(FFN(_join(path, layout.slot), module, layout))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no FFN that moe-tools knows; supported: {FAMILIES}"
        )
    return found


@torch.no_grad()
def permute_neurons(ffn: FFN, order_F: Tensor) -> None:
    """Reorders the neurons in place: new neuron i is old neuron order_F[i]. y stays the same.

    Raises:
        ValueError: `order_F` is not a permutation of the neurons.
    """
    weights = ffn.weights()
    neurons = len(weights.up_FD)
    if not torch.equal(order_F.sort().values.cpu(), torch.arange(neurons)):
        raise ValueError(f"{ffn.name}: the order is not a permutation of its {neurons} neurons")
    for tensor in weights.per_neuron():
        tensor.copy_(tensor[order_F.to(tensor.device)])


def graft(model: nn.Module, ffn: FFN, module: nn.Module) -> None:
    """Puts `module` in the FFN's slot; parts that the host calls elsewhere become Identity."""
    for path in ffn.layout.bypass:
        ffn.layer.set_submodule(path, nn.Identity())
    model.set_submodule(ffn.name, module)


def child_name(layout: Layout, path: str) -> str:
    """What a part is called inside our module: its host name wherever it already lived there."""
    inside = f"{layout.slot}." if layout.slot else ""
    return path.removeprefix(inside) if path.startswith(inside) else path.replace(".", "_")


def host_names(name: str, layout: Layout) -> dict[str, str]:
    """Prefixes of our module's tensors -> the host's own, where the two differ."""
    holder = name.removesuffix(layout.slot).removesuffix(".")
    pairs = {
        f"{name}.{child_name(layout, path)}.": f"{_join(holder, path)}." for path in layout.parts()
    }
    return {ours: host for ours, host in pairs.items() if ours != host}


def host_state_dict(model: nn.Module, renames: dict[str, str]) -> dict[str, Tensor]:
    """The state dict under the host's own names and shapes, our `router.*` tensors beside."""
    state = {_rename(key, renames): tensor for key, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, HostExperts):
            module.fuse_into(state, path)
    return state


def _rename(key: str, renames: dict[str, str]) -> str:
    for ours, host in renames.items():
        if key.startswith(ours):
            return host + key.removeprefix(ours)
    return key


def _join(holder: str, path: str) -> str:
    return ".".join(part for part in (holder, path) if part)
