"""Builds a part of a host: one layer, or all that stands around the layers.

A part is the stock class with every other module removed. `from_pretrained` then reads no more
of a checkpoint than the part, by all of its own rules: renamed keys, fused experts, dtypes, ties.
What is left keeps its path and the whole model's config, so every verb works on it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.layouts import join, layer_of


def layer_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that hold a model's FFNs, in the host's order; each is an item of a list.

    Raises:
        ValueError: the model has no FFN of a known family.
    """
    ffns = expert_ffns(model) or find_ffns(model)
    return tuple(dict.fromkeys(layer_of(ffn.name) for ffn in ffns))


class Gap(nn.Module):
    """Placeholder for a removed module; returns its first argument."""

    def forward(self, x: Any = None, *_: Any, **__: Any) -> Any:
        """Returns x."""
        return x


class OneLayer(nn.Module):
    """Replaces the forward pass of the host in a part of one layer."""

    layer_path: str
    run_layer: Callable[[nn.Module, Tensor], Tensor] | None = None
    """Runs the layer on the blocks with these numbers; whoever sets it knows where they are."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """The layer's output for the blocks whose numbers are `input_ids` (B, 1)."""
        assert self.run_layer is not None
        return self.run_layer(self.get_submodule(self.layer_path), input_ids)

    def sample_inputs(self) -> dict[str, Tensor]:
        """The first block of the text.

        Raises:
            ValueError: there is no text.
        """
        if self.run_layer is None:
            raise ValueError("one layer in memory runs on calibration text alone")
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises as the host does, except where a child was removed that T5 looks for."""
        if not any(isinstance(child, Gap) for child in module.children()):
            super()._init_weights(module)  # type: ignore[misc]


@dataclass(frozen=True)
class Part:
    """Says which part of a host to build."""

    layers: tuple[str, ...]
    """`layer_paths` of the whole model."""
    layer: str | None = None
    """The layer that is kept; None: everything but the layers."""

    def of_conversion(self, whole: Conversion) -> Conversion | None:
        """The conversion of this part, out of the whole model's; None if it has no FFN."""
        if self.layer is None:
            return None
        inside = f"{self.layer}."
        selector_of, activation_of, thresholds = (
            {name: own for name, own in settings.items() if name.startswith(inside)}
            for settings in (whole.selector_of, whole.activation_of, whole.thresholds or {})
        )
        own = replace(whole, selector_of=selector_of, activation_of=activation_of)
        return replace(own, thresholds=None if whole.thresholds is None else thresholds)

    def of(self, host: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """A subclass of the host's class that has this part alone."""
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
    """Removes every module that neither leads to `kept` nor is below it."""
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
