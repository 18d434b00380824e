"""Models whose layers are all fused compute a new token of all of them in one native call.

That is right only inside the `forward` of a model that does nothing between its layers, so it
holds there alone: of models whose code is that of a form below. What stands around the layers is
done by `around_layers.py`, or by the host's own code. Its loop then stays: the first layer computes
what all of them make, and the others hand on what they are given.

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
from transformers.cache_utils import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from moe_tools.inference.around_layers import NORM, new_token
from moe_tools.inference.fused_layer import FusedLayer, Parts, Step
from moe_tools.inference.growing_cache import SharedRoom, shared_room
from moe_tools.inference.in_front import InFront, put_in_front
from moe_tools.inference.layer_forms import code_of, rms_norm
from moe_tools.kernels.cpu.decoder_layer import CpuDecoderLayer, CpuStack, RMSNorm

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
    last: Parts | None
    """The norm behind the layers, where `native` knows it."""
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
        if layer is not self.layers[0]:
            return None
        self.now.h_B1D = self.computed(h_B1D, others)
        return self.now.h_B1D

    def behind_layers(self, h_B1D: Tensor, others: Mapping[str, Any]) -> tuple[Tensor, bool] | None:
        """Computes h behind all layers, and whether it is normed, too; None as in `computed`."""
        normed = self.last is not None and self.last.are_as_they_were()
        made = self.computed(h_B1D, others, normed=normed)
        return None if made is None else (made, normed)

    def computed(
        self, h_B1D: Tensor, others: Mapping[str, Any], *, normed: bool = False
    ) -> Tensor | None:
        """Computes h behind all layers; None: they compute one by one.

        Args:
            h_B1D: what enters the first layer.
            others: what each is given besides.
            normed: end with the norm behind them.
        """
        if not self.steps[0].fits(h_B1D, others):
            return None
        knobs = [0.0 if step.chosen is None else step.chosen.knob() for step in self.steps]
        cache, mask = others["past_key_values"], others.get("attention_mask")
        if None in knobs or not self.parts.are_as_they_were():
            return None
        room = self._room(cache, len(h_B1D))
        if room is None or (mask is not None and mask.shape[-1] != room.used + 1):
            return None
        cos_B1W, sin_B1W = others["position_embeddings"]
        made = self.native(
            h_B1D.contiguous(),
            cos_B1W,
            sin_B1W,
            room.all_2LBKSW,
            room.used,
            mask,
            cast("list[float]", knobs),
            normed=normed,
        )
        room.take(cache.layers[: len(self.steps)])
        return made

    def _room(self, cache: Any, sequences: int) -> SharedRoom | None:
        """A free position in the cache of every layer; None where the kernels cannot write it."""
        if type(cache) is not DynamicCache or cache.offloading:
            return None
        room = shared_room(cache, len(self.steps))
        if room is None:
            return None
        native = self.steps[0].native
        shape = (sequences, native.attention.key_heads, native.attention.head)
        _, _, batch, heads, _, head = room.all_2LBKSW.shape
        fits = room.all_2LBKSW.dtype == native.dtype and (batch, heads, head) == shape
        asked = torch.is_grad_enabled() and any(view.requires_grad for view in room.views)
        return room if fits and not asked else None


class FusedStack(InFront):
    """What `fuse_stack` puts in front of the class of a model."""

    made = ("_stack",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Lets the first layer compute what all of them make, where it can."""
        stack = None if torch.compiler.is_compiling() or self.training else self._prepared()
        if stack is None or not stack.is_of(self):
            return super().forward(*args, **kwargs)
        made = None if args else new_token(self, kwargs, stack.behind_layers)
        if made is not None:
            return made
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
    last = _last(model, natives[0])
    behind = None if last is None else Parts.of(model, [NORM], [NORM])
    return Stack(CpuStack(natives, last), list(layers), tuple(found), parts, behind, _Now())


def _last(model: nn.Module, native: CpuDecoderLayer) -> RMSNorm | None:
    norm = model._modules.get(NORM)
    found = None if norm is None else rms_norm(norm)
    if found is None or found.weight_D.shape != (native.width,):
        return None
    return found if found.weight_D.dtype == native.dtype else None


@functools.cache
def _codes() -> frozenset[Any]:
    return frozenset(code_of(kind.forward) for kind in _MODELS)
