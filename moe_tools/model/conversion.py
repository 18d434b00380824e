"""What `config.json` says about a converted model: enough to rebuild it around its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from moe_tools.model.experts import ExpertFFN, Mode, expert_ffns
from moe_tools.model.ffn import find_ffns, graft
from moe_tools.model.partition import experts_of_size
from moe_tools.model.routers import ROUTERS
from moe_tools.model.selectors import build_selector
from moe_tools.registry import unknown

FORMAT = 1

Off = Literal["zero", "mean"]
"""What an expert that is off contributes to the hidden activations."""


@dataclass(frozen=True)
class Conversion:
    """The `moe_tools` block of `config.json`."""

    donor: str
    """The dense model it was made from: folder, hub id or GGUF file, as the user gave it."""
    expert_size: int
    """Neurons of one expert."""
    router: str | None = None
    """Kind of router; None: the neurons are reordered, and the model is still dense."""
    selector: dict[str, Any] | None = None
    mode: Mode = "hard"
    when_off: Off = "zero"
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not isinstance(self.expert_size, int):
            raise ValueError(f"expert_size is a number of neurons, not {self.expert_size!r}")
        for kind, value, known in (("mode", self.mode, Mode), ("when_off", self.when_off, Off)):
            if value not in get_args(known):
                raise unknown(kind, str(value), get_args(known))

    def to_dict(self) -> dict[str, Any]:
        """The JSON block."""
        return asdict(self)

    @classmethod
    def from_dict(cls, block: Any) -> Conversion:
        """Reads the JSON block.

        Raises:
            ValueError: no mapping, an unknown or a missing key, a value that no field allows, or a
                format newer than this code.
        """
        if not isinstance(block, dict):
            raise ValueError(f"the moe_tools block of config.json is no mapping: {block!r}")
        if block.get("format") != FORMAT:  # first: a newer format may have new keys
            raise ValueError(
                f"config.json has moe_tools format {block.get('format')!r}; this version reads "
                f"{FORMAT}: install the moe-tools that wrote it"
            )
        known = {field.name for field in fields(cls)}
        for key in block:
            if key not in known:
                raise unknown("key in the moe_tools block of config.json", key, known)
        missing = {"donor", "expert_size"} - set(block)
        if missing:
            raise ValueError(
                f"the moe_tools block of config.json lacks {', '.join(sorted(missing))}"
            )
        return cls(**block)


def read_conversion(model: nn.Module) -> Conversion | None:
    """The model's block, or None for a model moe-tools never touched."""
    block = getattr(model.config, "moe_tools", None)
    return None if block is None else Conversion.from_dict(block)


def write_conversion(model: nn.Module, conversion: Conversion) -> None:
    """Puts the block into the model's config, from where `save` takes it."""
    model.config.moe_tools = conversion.to_dict()  # type: ignore[union-attr]


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Soft or hard, in every FFN and in the config."""
    conversion = read_conversion(model)
    if conversion is None:
        raise ValueError(f"{type(model).__name__} is dense: it has no routing mode to set")
    write_conversion(model, replace(conversion, mode=mode))
    for ffn in expert_ffns(model):
        ffn.mode = mode


def attach_experts(model: nn.Module, conversion: Conversion) -> list[ExpertFFN]:
    """Grafts an `ExpertFFN` with a fresh router onto every FFN of a dense model.

    Raises:
        ValueError: no router is named, the experts do not divide the neurons, top-k asks for more
            experts than there are, or the model is routed already.
    """
    if conversion.router is None or conversion.selector is None:
        raise ValueError("a routed model needs a router and a selector; this conversion has none")
    found = find_ffns(model)
    selector = build_selector(conversion.selector)
    for ffn in found:  # first all checks, then the first change
        experts = experts_of_size(len(ffn.weights().up_FD), conversion.expert_size, ffn.name)
        selector(torch.zeros(1, experts))  # top-k refuses fewer experts than k
    grafted = []
    for ffn in found:
        up_FD = ffn.weights().up_FD
        router = ROUTERS[conversion.router](up_FD.shape[1], len(up_FD) // conversion.expert_size)
        module = ExpertFFN(ffn, conversion.expert_size, router, selector, conversion.mode)
        module.to(up_FD.device)
        if conversion.when_off == "mean":
            module.off_F = up_FD.new_zeros(len(up_FD))
        module.train(ffn.layer.training)
        graft(model, ffn, module)
        grafted.append(module)
    write_conversion(model, conversion)
    return grafted
