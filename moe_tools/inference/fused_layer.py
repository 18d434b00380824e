"""Decoder layers of a known form compute a new token in two native calls.

Everything else is left to the host's own code: prompts, training, torch.compile, and a layer in
which somebody has hooked or replaced a part.

Letters: B sequences, D width, H heads of queries, K heads of keys, W numbers of a head, S
positions.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.hooks import all_are_heard
from moe_tools.experts.routers.base import ProductFP32
from moe_tools.experts.routers.bottleneck import BottleneckRouter
from moe_tools.experts.routers.few_bits import FewBitsRouter
from moe_tools.experts.routers.sigmoid import SigmoidRouter
from moe_tools.experts.selectors import Threshold, TopK
from moe_tools.hosts.activations import Activation, kernel_act
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.projections import Projections
from moe_tools.hosts.shapes import part_of
from moe_tools.inference import layer_forms
from moe_tools.inference.growing_cache import append
from moe_tools.inference.in_front import InFront
from moe_tools.inference.layer_forms import Found
from moe_tools.inference.packed_linear import PackedLinear
from moe_tools.kernels.cpu.decoder_layer import (
    MOST_SEQUENCES,
    ChosenFFN,
    CpuDecoderLayer,
    DenseFFN,
)
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.cpu.proposal import CpuProposal
from moe_tools.kernels.cpu.router import CpuRouter
from moe_tools.kernels.cpu.rows import FLOATS

_KNOWN = {
    "attention_mask",
    "cache_position",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "use_cache",
}
"""Arguments that layers of the known forms act upon, or hand to modules that the host computes or
that do not read them: `output_router_logits` comes with every token of a model with experts."""


@dataclass(frozen=True)
class Parts:
    """Modules that the kernels stand for, and what was read of them."""

    places: tuple[tuple[dict[str, nn.Module | None], str], ...]
    """Of each: the modules beside it, and its name among them."""
    modules: list[nn.Module]
    held: tuple[dict[str, Any], ...]
    """By each of them: all of this is asked for every token, and nothing of it is in a cache."""
    hooks: tuple[Mapping[Any, Any], ...]
    packed: tuple[tuple[dict[str, Any], CpuLinear], ...]
    """What a linear holds, and what was packed of it."""
    norms: tuple[tuple[dict[str, Any], int], ...]
    """A norm's parameters, and the address of the weight, which the kernels read where it lies."""

    @classmethod
    def of(cls, layer: nn.Module, paths: Sequence[str], norms: Collection[str]) -> Parts:
        """Those at some paths below a layer."""
        split = [path.rpartition(".") for path in paths]
        modules = [layer.get_submodule(path) for path in paths]
        hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in modules]
        linears = [module for module in modules if isinstance(module, PackedLinear)]
        found = [layer.get_submodule(path) for path in norms]
        return cls(
            tuple((layer.get_submodule(parent)._modules, name) for parent, _, name in split),
            modules,
            tuple(vars(module) for module in modules),
            tuple(hook for both in hooks for hook in both),
            tuple((vars(linear), linear.packed) for linear in linears),
            tuple((vars(norm)["_parameters"], _weight_of(norm)) for norm in found),
        )

    def with_those_of(self, others: Sequence[Parts]) -> Parts:
        """These and others, as one."""
        return Parts(
            tuple(chain(self.places, *(parts.places for parts in others))),
            list(chain(self.modules, *(parts.modules for parts in others))),
            tuple(chain(self.held, *(parts.held for parts in others))),
            tuple(chain(self.hooks, *(parts.hooks for parts in others))),
            tuple(chain(self.packed, *(parts.packed for parts in others))),
            tuple(chain(self.norms, *(parts.norms for parts in others))),
        )

    def are_as_they_were(self) -> bool:
        """Whether all are in their places, and nobody listens to one of them."""
        if any(self.hooks) or [beside.get(name) for beside, name in self.places] != self.modules:
            return False
        if any("forward" in held for held in self.held):
            return False
        return all(linear["packed"] is packed for linear, packed in self.packed) and all(
            parameters["weight"].data_ptr() == address for parameters, address in self.norms
        )


@dataclass(frozen=True)
class _Chosen:
    """A routed FFN whose experts or neurons are chosen as part of the second call."""

    native: CpuDecoderLayer
    ffn: ExpertFFN
    beside: Mapping[str, nn.Module | None]
    """The modules of the layer, among which it has to be still."""
    hooks: tuple[Mapping[Any, Any], ...]
    constant: Tensor | None
    """`bias_D` of the FFN, which the call adds."""

    def knob(self) -> float | None:
        """The threshold, or how many; None: the FFN is called as a module.

        That is where somebody looks at it, or something else chooses than did when it was made.
        """
        ffn, chooser = self.ffn, cast("ChosenFFN", self.native.ffn).chooser
        if self.beside.get(layer_forms.FFN) is not ffn or "forward" in ffn.__dict__:
            return None
        if ffn.mode != "hard" or ffn.training:
            return None
        if ffn.bias_D is not self.constant or ffn.off_RD is not None or any(self.hooks):
            return None
        selector = ffn.unseen_selector()
        if isinstance(chooser, CpuProposal):
            router = ffn.router
            same = isinstance(router, FewBitsRouter) and router.proposal is chooser
            return selector.tau if same and type(selector) is Threshold else None
        if not _chooses(ffn.router, chooser):
            return None
        if chooser.by_rank:
            return selector.count(ffn.division.num_experts) if type(selector) is TopK else None
        return selector.tau if type(selector) is Threshold else None


def _chooses(router: nn.Module, chooser: CpuRouter) -> bool:
    """Whether a router is what was prepared of it."""
    first, last = _products(router)
    if last is None or last.packed is not chooser.weight or not last.is_packed():
        return False
    if first is not None and (first.packed is not chooser.first or not first.is_packed()):
        return False
    if first is not None and (first._forward_hooks or first._forward_pre_hooks):
        return False
    prepared, bias = cast("Tensor", chooser.bias_E), last.bias
    if bias is None or (first is None) != (chooser.first is None):
        return False
    return bias.dtype == torch.float32 and bias.data_ptr() == prepared.data_ptr()


def _products(router: nn.Module) -> tuple[ProductFP32 | None, ProductFP32 | None]:
    """The products of a router whose scores are their sigmoid: the first, if any, and the last."""
    if type(router) is SigmoidRouter:
        return None, router
    if type(router) is BottleneckRouter:
        return router.first, router.second
    return None, None


@dataclass(frozen=True)
class Step:
    """What was prepared for a layer."""

    native: CpuDecoderLayer
    index: int
    parts: Parts
    behind_ffn: str | None
    """The norm that the host computes, where it computes the FFN."""
    chosen: _Chosen | None
    config: Mapping[str, Any]
    """Of the host: what it holds, since asking a config itself takes microseconds."""
    attentions: frozenset[str]
    """Names of attentions that give the same numbers."""

    def takes(self, h_B1D: Tensor, others: Mapping[str, Any]) -> bool:
        """Whether a call is one that the kernels compute."""
        return self.fits(h_B1D, others) and self.parts.are_as_they_were()

    def fits(self, h_B1D: Tensor, others: Mapping[str, Any]) -> bool:
        """Whether the arguments are what they compute: new tokens, with a cache behind them."""
        sequences, length, width = h_B1D.shape if h_B1D.ndim == 3 else (0, 0, 0)
        if length != 1 or sequences > MOST_SEQUENCES or width != self.native.width:
            return False
        if h_B1D.dtype != self.native.dtype or not others.keys() <= _KNOWN:
            return False
        if h_B1D.requires_grad and torch.is_grad_enabled():
            return False
        cache = others.get("past_key_values")
        if not isinstance(cache, Cache) or self.index >= len(cache.layers):
            return False
        if torch.is_grad_enabled() and _asks_for_gradients(cache.layers[self.index]):
            return False
        if self.config.get("_attn_implementation_internal") not in self.attentions:
            return False
        return (
            self._is_position(others.get("position_embeddings"), sequences)
            and _is_mask(others.get("attention_mask"), sequences)
            and not all_are_heard()
        )

    def _is_position(self, embedded: Any, sequences: int) -> bool:
        if not isinstance(embedded, tuple) or len(embedded) != 2:
            return False
        dtype, head = self.native.dtype, self.native.attention.head
        shapes = (1, 1, head), (sequences, 1, head)
        return all(
            part.dtype == dtype and part.shape in shapes and part.is_contiguous()
            for part in embedded
        )

    def __call__(self, layer: nn.Module, h_B1D: Tensor, others: Mapping[str, Any]) -> Tensor:
        """Computes h behind the layer, and appends to the cache."""
        h_B1D = h_B1D.contiguous()
        q_BH1W, k_BK1W, v_BK1W = self.native.new_heads(h_B1D, *others["position_embeddings"])
        keys, values = _appended(others["past_key_values"], self.index, k_BK1W, v_BK1W)
        keys, values = self._readable(keys), self._readable(values)
        mask = others.get("attention_mask")
        if mask is not None and mask.shape[-1] != keys.shape[2]:
            raise ValueError(f"a mask of {mask.shape[-1]} positions, a cache of {keys.shape[2]}")
        if self.chosen is not None and (knob := self.chosen.knob()) is not None:
            return self.chosen.native.new_token(h_B1D, q_BH1W, keys, values, mask, knob)[0]
        h_B1D, x_B1D = self.native.new_token(h_B1D, q_BH1W, keys, values, mask)
        if self.native.ffn is not None:
            return h_B1D
        y_B1D = cast("Any", layer).mlp(x_B1D)
        if self.behind_ffn is not None:
            y_B1D = layer.get_submodule(self.behind_ffn)(y_B1D)
        return h_B1D + y_B1D

    def _readable(self, cached_BKSW: Tensor) -> Tensor:
        if cached_BKSW.dtype == self.native.dtype and cached_BKSW.stride(-1) == 1:
            return cached_BKSW
        return cached_BKSW.to(self.native.dtype).contiguous()


class FusedLayer(InFront):
    """What `fuse_layers` puts in front of the class of a layer."""

    made = ("_step", "_stack")

    _step: Step | None
    _ffn_layout: Layout | None
    _attentions: frozenset[str]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes h behind the layer, natively where `Step.takes` the call."""
        if not torch.compiler.is_compiling() and not args and not self.training:
            stack = self.__dict__.get("_stack")
            if stack is not None:
                h_B1D = stack.handed_on(self, hidden_states, kwargs)
                if h_B1D is not None:
                    return h_B1D
            step = self.prepared()
            if step is not None and step.takes(hidden_states, kwargs):
                return step(self, hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def prepared(self) -> Step | None:
        """Prepares the layer, also where a copy or a pickle of it left that out."""
        if "_step" not in self.__dict__:
            found = layer_forms.find(self, self.host)
            made = None
            if isinstance(found, Found):
                made = prepare(self, found, self._ffn_layout, self._attentions)
            self.__dict__["_step"] = made
        return cast("Step | None", self.__dict__["_step"])


def prepare(
    layer: nn.Module, found: Found, layout: Layout | None, attentions: frozenset[str]
) -> Step:
    """Prepares what computes the new tokens of a layer.

    Args:
        layer: with packed linears.
        found: its parts.
        layout: of its FFN, where that is a plain dense one.
        attentions: implementations of attention that give the same numbers.
    """
    ffn, paths = None, list(found.paths)
    if layout is not None and (ffn := _dense_ffn(layer, layout)) is not None:
        paths += [layer_forms.FFN, *(f"{layer_forms.FFN}.{path}" for path in layout.parts())]
    behind = found.names.behind_ffn
    chosen = None if ffn else _chosen(layer, found)
    if ffn is None and chosen is None and behind is not None:
        paths.remove(behind)  # the host's own module computes it
    norms = [path for path in paths if path in found.norm_paths]
    native = CpuDecoderLayer(found.attention, found.norms, found.dtype, ffn)
    parts = Parts.of(layer, paths, norms)
    config = vars(layer.get_submodule(layer_forms.ATTENTION).config)
    behind = None if ffn else behind
    return Step(native, found.index, parts, behind, chosen, config, attentions)


def _chosen(layer: nn.Module, found: Found) -> _Chosen | None:
    """A routed FFN that chooses natively, None where another one is there."""
    ffn = layer._modules[layer_forms.FFN]
    if not isinstance(ffn, ExpertFFN) or not isinstance(ffn.packed, CpuFFN) or ffn.layout.masked:
        return None
    chooser = _chooser(ffn)
    if chooser is None or ffn.off_RD is not None:
        return None
    constant_D = None if ffn.bias_D is None else ffn.bias_D.detach().float().contiguous()
    made = ChosenFFN(chooser, ffn.packed.kernel, constant_D)
    native = CpuDecoderLayer(found.attention, found.norms, found.dtype, made)
    hooks = ffn._forward_hooks, ffn._forward_pre_hooks
    return _Chosen(native, ffn, layer._modules, hooks, ffn.bias_D)


def _chooser(ffn: ExpertFFN) -> CpuProposal | CpuRouter | None:
    router = ffn.router
    if isinstance(router, FewBitsRouter):
        return router.proposal
    first, last = _products(router)
    if last is None or ffn.shared or type(ffn.selector) not in (Threshold, TopK):
        return None
    if last.packed is None or last.bias is None or last.bias.dtype != torch.float32:
        return None
    if first is not None and first.packed is None:
        return None
    by_rank = type(ffn.selector) is TopK
    before = None if first is None else first.packed
    return CpuRouter(last.packed, last.bias.detach(), by_rank=by_rank, first=before)


def _dense_ffn(layer: nn.Module, layout: Layout) -> DenseFFN | None:
    """An FFN in the words of the kernels, None where the host's module computes it."""
    holder = layer.get_submodule(layer_forms.FFN)
    parts = Projections.of(layout, functools.partial(part_of, holder))
    act = kernel_act(parts.act)
    linears = (parts.up, parts.down) if parts.gate is None else (parts.up, parts.down, parts.gate)
    whole = layout.slot or layout.masked or layout.hidden_dropout or layout.output_dropout
    if whole or act is None or parts.gate is parts.up or isinstance(parts.act, Activation):
        return None
    if not all(isinstance(linear, PackedLinear) for linear in linears):
        return None
    up, down, *gate = (linear.packed for linear in cast("Sequence[PackedLinear]", linears))
    if gate and gate[0].dtype != up.dtype:
        return None
    return DenseFFN(up, down, act, *gate)


def _appended(cache: Cache, index: int, k_BK1W: Tensor, v_BK1W: Tensor) -> tuple[Tensor, Tensor]:
    layer = cache.layers[index]
    if type(cache) is DynamicCache and type(layer) is DynamicLayer and not cache.offloading:
        return append(layer, k_BK1W, v_BK1W)
    return cache.update(k_BK1W, v_BK1W, index)


def _weight_of(norm: nn.Module) -> int:
    return cast("Tensor", norm.weight).data_ptr()


def _asks_for_gradients(layer: Any) -> bool:
    """Whether a cache holds keys or values that do."""
    held = getattr(layer, "keys", None), getattr(layer, "values", None)
    return any(one is not None and one.requires_grad for one in held)


def _is_mask(mask: Any, sequences: int) -> bool:
    if mask is None:
        return True
    return (
        isinstance(mask, Tensor)
        and mask.ndim == 4
        and mask.shape[:3] in ((1, 1, 1), (sequences, 1, 1))
        and mask.stride(3) == 1
        and mask.dtype in (torch.bool, *FLOATS)
    )
