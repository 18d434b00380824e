"""Models whose layers are all fused compute a new token of all of them in one native call.

The host's own loop over its layers stays: the first layer computes what all of them make, and the
others hand on what they are given. That is right only inside the `forward` of a model that does
nothing between its layers, so it holds there alone: of models whose code is that of a form below.
What stands between two calls takes longer than a layer of a small model.

Letters: B sequences, D width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from moe_tools.inference.fused_layer import FusedLayer, Parts, Step
from moe_tools.inference.growing_cache import Room, room_in
from moe_tools.inference.in_front import InFront, put_in_front
from moe_tools.inference.layer_forms import code_of
from moe_tools.kernels.cpu.decoder_layer import CpuStack

_MODELS = (
    modeling_llama.LlamaModel,
    modeling_mistral.MistralModel,
    modeling_qwen2.Qwen2Model,
    modeling_qwen3.Qwen3Model,
)


_preparing = threading.Lock()
"""Of two threads that call a model for the first time, one prepares it."""


class _Now(threading.local):
    """Of each thread: what happens in the model right now."""

    inside: bool = False
    """Whether it is in the `forward` of the model."""
    h_B1D: Tensor | None = None
    """What the first layer computed for all."""


@dataclass(frozen=True)
class Stack:
    """What was prepared for the layers of a model."""

    native: CpuStack
    layers: list[nn.Module]
    steps: tuple[Step, ...]
    parts: Parts
    now: _Now

    def is_of(self, model: nn.Module) -> bool:
        """Whether a model runs these layers and no others, and each of them knows of it."""
        held = cast("nn.ModuleList", model._modules["layers"])._modules
        if list(held.values()) != self.layers:
            return False
        if vars(model.config).get("num_hidden_layers") != len(self.layers):
            return False
        return all(
            layer.__dict__.get("_stack") is self and not layer.training for layer in self.layers
        )

    def handed_on(
        self, layer: nn.Module, h_B1D: Tensor, others: Mapping[str, Any]
    ) -> Tensor | None:
        """What a layer returns as part of this; None: it computes for itself."""
        if not self.now.inside:
            return None
        if h_B1D is self.now.h_B1D:
            return h_B1D
        if layer is not self.layers[0] or not self.steps[0].fits(h_B1D, others):
            return None
        self.now.h_B1D = self._computed(h_B1D, others)
        return self.now.h_B1D

    def _computed(self, h_B1D: Tensor, others: Mapping[str, Any]) -> Tensor | None:
        knobs = [0.0 if step.chosen is None else step.chosen.knob() for step in self.steps]
        cache, mask = others["past_key_values"], others.get("attention_mask")
        if None in knobs or not self.parts.are_as_they_were():
            return None
        rooms = self._rooms(cache, len(h_B1D))
        if rooms is None:
            return None
        used = rooms[0].used
        if mask is not None and mask.shape[-1] != used + 1:
            return None
        cos_B1W, sin_B1W = others["position_embeddings"]
        made = self.native(
            h_B1D.contiguous(),
            cos_B1W,
            sin_B1W,
            [room.all_keys_BKSW for room in rooms],
            [room.all_values_BKSW for room in rooms],
            used,
            mask,
            cast("list[float]", knobs),
        )
        for room, layer in zip(rooms, cache.layers, strict=False):
            room.take(layer)
        return made

    def _rooms(self, cache: Any, sequences: int) -> list[Room] | None:
        """A free position in the cache of every layer; None where they are not alike."""
        layers = cache.layers[: len(self.steps)]
        if type(cache) is not DynamicCache or cache.offloading or len(layers) < len(self.steps):
            return None
        if any(type(layer) is not DynamicLayer for layer in layers):
            return None
        rooms = [room for layer in layers if (room := room_in(layer)) is not None]
        if len(rooms) < len(layers):
            return None
        like, native = rooms[0], self.steps[0].native
        dtype, sizes, used = native.dtype, native.attention, like.used
        shape = (sequences, sizes.key_heads, like.all_keys_BKSW.shape[2], sizes.head)
        alike = all(
            room.used == used
            and not room.keys_BKSW.requires_grad
            and not room.values_BKSW.requires_grad
            and room.all_keys_BKSW.shape == shape == room.all_values_BKSW.shape
            and room.all_keys_BKSW.dtype == dtype == room.all_values_BKSW.dtype
            for room in rooms
        )
        return rooms if alike else None


class FusedStack(InFront):
    """What `fuse_stack` puts in front of the class of a model."""

    made = ("_stack",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Lets the first layer compute what all of them make, where it can."""
        stack = None if torch.compiler.is_compiling() or self.training else self._prepared()
        if stack is None or not stack.is_of(self):
            return super().forward(*args, **kwargs)
        with _inside(stack.now):
            return super().forward(*args, **kwargs)

    def _prepared(self) -> Stack | None:
        """Prepares the layers, also where a copy or a pickle of the model left that out."""
        if "_stack" not in self.__dict__:
            with _preparing:
                if "_stack" not in self.__dict__:
                    made = _prepare(self)
                    for layer in () if made is None else made.layers:
                        layer.__dict__["_stack"] = made
                    self.__dict__["_stack"] = made
        return cast("Stack | None", self.__dict__["_stack"])


def fuse_stack(model: nn.Module) -> None:
    """Lets a model whose layers are all fused compute a new token in one call, in place."""
    for module in list(model.modules()):
        known = code_of(type(module).forward) in _codes() and _is_uniform(module)
        if known and _prepare(module) is not None:
            put_in_front(FusedStack, module)


def _is_uniform(module: nn.Module) -> bool:
    """Whether all layers are given the same mask."""
    kinds = getattr(module.config, "layer_types", None)
    return len(set(kinds or [])) <= 1


@contextmanager
def _inside(now: _Now) -> Iterator[None]:
    now.inside = True
    try:
        yield
    finally:
        now.inside, now.h_B1D = False, None


def _prepare(model: nn.Module) -> Stack | None:
    layers = cast("nn.ModuleList", model.layers)
    steps = [layer.prepared() if isinstance(layer, FusedLayer) else None for layer in layers]
    found = [step for step in steps if step is not None]
    if (
        not found
        or len(found) < len(layers)
        or len(layers) != vars(model.config).get("num_hidden_layers")
    ):
        return None
    natives = [step.chosen.native if step.chosen else step.native for step in found]
    sizes = {(native.dtype, native.width, *native.attention.sizes) for native in natives}
    in_order = [step.index for step in found] == list(range(len(found)))
    if len(sizes) > 1 or not in_order or any(native.ffn is None for native in natives):
        return None
    own = Parts.of(model, [f"layers.{index}" for index in range(len(layers))], [])
    parts = own.with_those_of([step.parts for step in found])
    return Stack(CpuStack(natives), list(layers), tuple(found), parts, _Now())


@functools.cache
def _codes() -> frozenset[Any]:
    return frozenset(code_of(kind.forward) for kind in _MODELS)
