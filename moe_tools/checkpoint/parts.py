"""A host in parts: one layer, or all that stands around the layers.

A part is the stock class with every other module taken out. `from_pretrained` then reads no more
of a checkpoint than the part, by all of its own rules: renamed keys, fused experts, dtypes, ties.
What is left keeps its path and the whole model's config, so every verb works on it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.layouts import join


def layer_paths(model: nn.Module) -> tuple[str, ...]:
    """The layers that hold a model's FFNs, in the host's order: each an item of a list.

    Raises:
        ValueError: the model has no FFN of a known family.
    """
    ffns = expert_ffns(model) or find_ffns(model)
    return tuple(dict.fromkeys(_layer_of(ffn.name) for ffn in ffns))


def _layer_of(path: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.experts.0`."""
    names = path.split(".")
    first = next(place for place, name in enumerate(names) if name.isdigit())
    return ".".join(names[: first + 1])


class Gap(nn.Module):
    """Stands where something was taken out, and hands on what it gets first."""

    def forward(self, x: Any = None, *_: Any, **__: Any) -> Any:
        """x."""
        return x


class OneLayer(nn.Module):
    """What a part of one layer has instead of its host's forward pass."""

    layer_path: str
    run_layer: Callable[[nn.Module, Tensor], Tensor] | None = None
    """Runs the layer on the blocks of these numbers; where they come from is not the part's to
    know."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Of blocks that are called by their numbers (B, 1): what leaves the layer."""
        assert self.run_layer is not None
        return self.run_layer(self.get_submodule(self.layer_path), input_ids)

    def _init_weights(self, module: nn.Module) -> None:
        """The host's, who looks for what was taken out (T5 does)."""
        if not any(isinstance(child, Gap) for child in module.children()):
            super()._init_weights(module)  # type: ignore[misc]


@dataclass(frozen=True)
class Part:
    """Which part of a host."""

    layers: tuple[str, ...]
    """Of the whole model: `layer_paths`."""
    layer: str | None = None
    """The one that is kept; None: everything but the layers."""

    def of_conversion(self, whole: Conversion) -> Conversion | None:
        """What a converted model's block says of this part; None: nothing."""
        if self.layer is None:
            return None
        inside = f"{self.layer}."
        selector_of, activation_of = (
            {name: own for name, own in settings.items() if name.startswith(inside)}
            for settings in (whole.selector_of, whole.activation_of)
        )
        return replace(whole, selector_of=selector_of, activation_of=activation_of)

    def of(self, host: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The host's class, made of this part alone."""
        part = self

        def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
            host.__init__(self, config, *args, **kwargs)
            part._take_out(self)

        own: dict[str, Any] = {"__init__": build, "__module__": host.__module__}
        if self.layer is None:
            return type(host.__name__, (host,), own)
        return type(host.__name__, (OneLayer, host), {**own, "layer_path": self.layer})

    def _take_out(self, model: PreTrainedModel) -> None:
        if self.layer is None:
            for path in self.layers:
                model.set_submodule(path, Gap())
            return
        model.all_tied_weights_keys = {}  # of modules that are not there
        _keep_only(model, "", self.layer)


def _keep_only(module: nn.Module, path: str, kept: str) -> None:
    """Takes out what neither leads to `kept` nor is below it."""
    for name in [*dict(module.named_parameters(recurse=False))]:
        module.register_parameter(name, None)
    for name in [*dict(module.named_buffers(recurse=False))]:
        module.register_buffer(name, None)
    for name, child in list(module.named_children()):
        here = join(path, name)
        if kept.startswith(f"{here}."):
            _keep_only(child, here, kept)
        elif here != kept:
            module.set_submodule(name, Gap())
