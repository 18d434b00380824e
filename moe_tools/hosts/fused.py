"""How a host stores the experts of a layer in fused parameters: read from the module itself.

transformers writes the layout on the module: the flags of its `use_experts_implementation`. A flag
that an older version lacks has its default. Without any flag the shapes say it, and `prove` in
`moe_host` compares what we make of them with what the host computes.

Letters: X experts of the host, D model width, F neurons of one expert.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_tools.hosts.linears import WAY_OUT as DEQUANTISED
from moe_tools.hosts.linears import is_numbers

Calls = Literal["chosen", "every", "weighed"]
"""How the host calls its experts. chosen: with tokens, and the experts and weights of each.
every: with T tokens for each expert, in one tensor of X T rows; a row of zeros was not chosen.
weighed: every expert runs on every token; only the weights are given."""
CALLS: dict[int, Calls] = {1: "every", 2: "weighed", 3: "chosen"}
"""Number of arguments -> how experts without flags are called."""
TOKENS = 8
FLAT = {"gate_proj.weight": "w1", "up_proj.weight": "v1", "down_proj.weight": "w2"}
"""Tensor of one expert -> how Megablocks and DBRX call that of all experts."""
WAY_OUT = "leave this model dense, or ask for its layout at moe-tools"
NOT_EXPERTS = (nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Modules of torch whose own parameters may have three dimensions."""


@dataclass(frozen=True)
class Storage:
    """How a host stores and calls the experts of one layer."""

    tensors: dict[str, str]
    """Tensor of one expert -> the host's parameter, whose first dimension is the expert."""
    transposed: bool = False
    """Matrices are (inputs, outputs), not (outputs, inputs) as in a linear."""
    interleaved: bool = False
    """Gate and up rows alternate."""
    own_gate: bool = False
    """The host joins gate and up rows in its own way."""
    flat: int = 0
    """X where each matrix has a row for every neuron of all X experts, one after the other."""
    act: str = "act_fn"
    """Path of the activation below the host's module."""
    calls: Calls = "chosen"
    proven: bool = True
    """transformers says all this; False: it was concluded from shapes and has to be proven."""

    @property
    def up(self) -> str:
        """The host's parameter that holds the up rows."""
        name = "gate_up_proj.weight"
        return self.tensors.get(name) or self.tensors["up_proj.weight"]

    def is_turned(self, ours: str) -> bool:
        """Whether the host keeps a matrix of an expert transposed."""
        return self.transposed or (self.flat > 0 and ours == "down_proj.weight")

    def each(self, whole: Tensor) -> Tensor:
        """A parameter of the host with the expert as its first dimension."""
        return whole.unflatten(0, (self.flat, -1)) if self.flat else whole

    @property
    def for_kernels(self) -> bool:
        """Whether the MoE kernels can read it: gated, concatenated, without biases."""
        plain = set(self.tensors) == {"gate_up_proj.weight", "down_proj.weight"}
        joined = not self.interleaved and not self.own_gate and not self.flat
        return plain and joined and self.calls == "chosen" and self.proven


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the fused experts of every layer that has them, by path, in the host's order.

    Raises:
        ValueError: a module has experts that nothing here can read: they would stay as they are,
            whatever is done to the other FFNs, and nobody would see it.
    """
    found = {}
    counts = _expert_counts(model)
    for path, module in model.named_modules():
        if is_fused(module):
            found[path] = module
        elif path.rpartition(".")[0] not in found:
            _check_no_experts(path, module, counts)
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds up and down projections of many experts as its own parameters."""
    own = _matrices(module)
    stacked = "down_proj" in own and ("gate_up_proj" in own or "up_proj" in own)
    return stacked or _flat_child(module) is not None


def check_fused(path: str, fused: nn.Module) -> Storage:
    """Reads how a fused module stores its experts.

    Raises:
        ValueError: it computes what our experts do not, or its experts are spread over devices.
    """
    flags: Any = fused  # older versions lack some of them
    if getattr(flags, "_is_expert_parallel", False):
        raise ValueError(
            f"{path}: its experts are spread over devices: load the model without expert "
            "parallelism"
        )
    if getattr(flags, "has_post_expert_norm", False):
        raise _refusal(path, fused, "it has a norm after each expert, which no FFN of ours has")
    flagged = getattr(flags, "is_transposed", None) is not None
    storage = _by_flags(fused) if flagged else _by_shapes(path, fused)
    _check_parameters(path, fused, storage)
    return storage


def _by_flags(fused: Any) -> Storage:
    gated = getattr(fused, "has_gate", True)
    tensors = _names(["gate_up_proj" if gated else "up_proj", "down_proj"])
    if getattr(fused, "has_bias", False):
        tensors |= {f"{host}.bias": f"{host}_bias" for host in tensors.values()}
    own_gate = gated and _has_own_gate(fused)
    concatenated = getattr(fused, "is_concatenated", None)  # began with transformers 5.8
    interleaved = own_gate and _alternates(fused) if concatenated is None else not concatenated
    return Storage(tensors, fused.is_transposed, interleaved=interleaved, own_gate=own_gate)


@torch.no_grad()
def _alternates(fused: Any) -> bool:
    """Whether gate and up rows of one neuron stand side by side: by what its gate makes of them."""
    shape = fused.gate_up_proj.shape
    width = shape[2] if fused.is_transposed else shape[1]
    rows_TF = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(0))
    other_TF = rows_TF.clone()
    other_TF[:, 1] += 1.0
    changed_F = (fused._apply_gate(other_TF) != fused._apply_gate(rows_TF)).any(0)
    return bool(changed_F[0])


def _by_shapes(path: str, fused: nn.Module) -> Storage:
    """What the shapes say of experts without flags, which are taken to have no biases."""
    flat = _flat_child(fused)
    if flat is not None:
        names = {ours: f"{flat}.{host}" for ours, host in FLAT.items()}
        act = f"{flat}.activation_fn"
        return Storage(names, flat=_number(fused), act=act, proven=False)
    own = _matrices(fused)
    tensors = _names([name for name in ("gate_up_proj", "gate_proj", "up_proj") if name in own])
    tensors |= _names(["down_proj"])
    up, down = own[next(iter(tensors.values()))], own["down_proj"]
    rows = 2 if "gate_up_proj" in own else 1
    straight = down[2] * rows == up[1] and down[1] == up[2]
    turned = down[1] * rows == up[2] and down[2] == up[1]
    arguments = len(inspect.signature(type(fused).forward).parameters) - 1
    if not straight and not turned:
        raise _refusal(path, fused, "their shapes are those of no FFN")
    if arguments not in CALLS:
        raise _refusal(path, fused, f"it is called with {arguments} arguments")
    own_gate = "gate_up_proj" in own and _has_own_gate(fused)
    calls = CALLS[arguments]
    return Storage(tensors, not straight, own_gate=own_gate, calls=calls, proven=False)


def _flat_child(module: nn.Module) -> str | None:
    """The child that keeps the neurons of all experts as rows of three matrices (Megablocks)."""
    for name, child in module.named_children():
        own = {key: tuple(p.shape) for key, p in child.named_parameters(recurse=False)}
        alike = set(own) == set(FLAT.values()) and len(set(own.values())) == 1
        if alike and _number(module) and own["w1"][0] % _number(module) == 0:
            return name
    return None


def _number(module: nn.Module) -> int:
    """How many experts a module says that it has; 0: it does not."""
    number = getattr(module, "num_experts", 0)
    return number if isinstance(number, int) else 0


def _names(hosts: list[str]) -> dict[str, str]:
    return {f"{host}.weight": host for host in hosts}


def _has_own_gate(fused: nn.Module) -> bool:
    """Also where its activation is a function, not a module: nothing could be put in its place."""
    gate = getattr(type(fused), "_apply_gate", None)
    if gate is None:
        return False
    return gate.__module__ != "transformers.integrations.moe" or not _has_activation(fused)


def _has_activation(fused: nn.Module) -> bool:
    return isinstance(getattr(fused, "act_fn", None), nn.Module)


def _check_parameters(path: str, fused: nn.Module, storage: Storage) -> None:
    """Checks that a fused module has the parameters that its storage names, and no others."""
    known = set(storage.tensors.values())
    there = {name for name, _ in fused.named_parameters()}
    there |= {name for name, _ in fused.named_buffers()}
    if known != there:
        said = ", ".join(sorted(known ^ there))
        raise _refusal(path, fused, f"{said}: expected {', '.join(sorted(known))} alone")
    for name in sorted(known):
        parameter = fused.get_parameter(name)
        if not is_numbers(parameter):
            raise ValueError(f"{path}: {name} is quantised ({parameter.dtype}): {DEQUANTISED}")
    sizes = {name: len(fused.get_parameter(name)) for name in known}
    if storage.proven and len(set(sizes.values())) > 1:
        raise _refusal(path, fused, f"they are of different numbers of experts: {sizes}")
    if not storage.own_gate and storage.act not in dict(fused.named_modules()):
        raise _refusal(path, fused, f"it has no activation {storage.act}")


def _matrices(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own parameters that have three dimensions."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def _expert_counts(model: nn.Module) -> set[int]:
    """Numbers of experts that a host's config names, whatever it calls them."""
    config: Any = getattr(model, "config", None)
    named = {} if config is None else config.get_text_config().to_dict()
    numbers = {key: value for key, value in named.items() if isinstance(value, int) and value > 1}
    return {value for key, value in numbers.items() if "expert" in key and "per_tok" not in key}


def _check_no_experts(path: str, module: nn.Module, counts: set[int]) -> None:
    """Refuses parameters that look like experts: by their module's name, or by their number.

    Three dimensions alone say nothing: a host may keep a matrix for each head of its attention.
    """
    if isinstance(module, NOT_EXPERTS) or type(module).__module__.startswith("moe_tools."):
        return
    own = [tuple(p.shape) for p in module.parameters(recurse=False)]
    three = [shape for shape in own if len(shape) == 3 and min(shape) > 1]
    two = [shape for shape in own if len(shape) == 2]
    counted = [shape for shape in three if shape[0] in counts]
    named = "expert" in f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    if len(counted) > 1 or (named and (three or len(two) > 2)):
        raise _refusal(path, module, "moe-tools does not know how they are used")


def _refusal(path: str, module: nn.Module, reason: str) -> ValueError:
    seen = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    shapes = ", ".join(f"{name} {shape}" for name, shape in seen.items()) or "none"
    return ValueError(
        f"{path}: experts of class {type(module).__name__} cannot be taken apart: {reason} "
        f"(its parameters: {shapes}); {WAY_OUT}"
    )
