"""What `config.json` says about a converted model: enough to rebuild it around its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from moe_tools.model.experts import ExpertFFN, Mode, expert_ffns
from moe_tools.model.ffn import find_ffns, graft
from moe_tools.model.partition import experts_of_size
from moe_tools.model.routers import ROUTERS
from moe_tools.model.selectors import build_selector
from moe_tools.registry import unknown

FORMAT = 1


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
    off: Literal["zero", "mean"] = "zero"
    """What an expert that is off contributes to the hidden activations."""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """The JSON block."""
        return asdict(self)

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> Conversion:
        """Reads the JSON block.

        Raises:
            ValueError: an unknown key, or a format newer than this code.
        """
        known = {field.name for field in fields(cls)}
        for key in block:
            if key not in known:
                raise unknown("key in the moe_tools block of config.json", key, known)
        if block.get("format") != FORMAT:
            raise ValueError(
                f"config.json has moe_tools format {block.get('format')!r}; this version reads "
                f"{FORMAT}: install the moe-tools that wrote it"
            )
        return cls(**block)


def read_conversion(model: nn.Module) -> Conversion | None:
    """The model's block, or None for a model moe-tools never touched."""
    block = getattr(model.config, "moe_tools", None)
    return None if block is None else Conversion.from_dict(block)


def write_conversion(model: nn.Module, conversion: Conversion) -> None:
    """Puts the block into the model's config, from where `save` takes it."""
    model.config.moe_tools = conversion.to_dict()


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Soft or hard, in every FFN and in the config."""
    conversion = read_conversion(model)
    if conversion is None:
        raise ValueError(f"{type(model).__name__} is dense: it has no routing mode to set")
    for ffn in expert_ffns(model):
        ffn.mode = mode
    write_conversion(model, replace(conversion, mode=mode))


def attach_experts(model: nn.Module, conversion: Conversion) -> list[ExpertFFN]:
    """Grafts an `ExpertFFN` with a fresh router onto every FFN of a dense model.

    Raises:
        ValueError: no router is named, or the experts do not divide the neurons.
    """
    if conversion.router is None or conversion.selector is None:
        raise ValueError("a routed model needs a router and a selector; this conversion has none")
    found = find_ffns(model)
    for ffn in found:  # first all checks, then the first change
        experts_of_size(len(ffn.weights().up_FD), conversion.expert_size, ffn.name)
    selector = build_selector(conversion.selector)
    grafted = []
    for ffn in found:
        up_FD = ffn.weights().up_FD
        router = ROUTERS[conversion.router](up_FD.shape[1], len(up_FD) // conversion.expert_size)
        module = ExpertFFN(ffn, conversion.expert_size, router, selector, conversion.mode)
        module.to(up_FD.device)
        if conversion.off == "mean":
            module.off_F = up_FD.new_zeros(len(up_FD))
        module.train(ffn.layer.training)
        graft(model, ffn, module)
        grafted.append(module)
    write_conversion(model, conversion)
    return grafted
