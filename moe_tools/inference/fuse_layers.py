"""Finds the decoder layers that can be fused, and proves each against its host.

Letters: B sequences, D width, K heads of keys, W numbers of a head, S positions.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from moe_tools.hosts.ffn import FFN
from moe_tools.inference import layer_forms
from moe_tools.inference.fused_layer import FusedLayer, Step, prepare
from moe_tools.inference.in_front import put_in_front
from moe_tools.kernels.cpu.decoder_layer import CpuDecoderLayer
from moe_tools.kernels.cpu.rows import FLOATS

_log = logging.getLogger(__name__)

NEAR_FLOATS, NEAR_CODES = 1e-5, 1e-2
"""How far we may be from the host in fp32, relative to the largest number: with weights as floats,
and in few bits, where x is rounded, too, and a difference in its last place may show."""


def fuse_layers(model: nn.Module, dense: Sequence[FFN]) -> None:
    """Lets the layers of known forms compute new tokens natively, in place.

    One line of the log says how many were fused, and why others were not.

    Args:
        model: in eval mode, its linears packed.
        dense: FFNs that are proven to be plain, whose linears are packed.
    """
    layouts = {ffn.name: ffn.layout for ffn in dense if not ffn.also}
    reasons: Counter[str] = Counter()
    fused = 0
    for path, layer in list(model.named_modules()):
        host = type(layer)
        found = layer_forms.find(layer, host)
        if found is None:
            continue
        if isinstance(found, str):
            reasons[found] += 1
            continue
        layout = layouts.get(f"{path}.{layer_forms.FFN}")
        proven = {layer.get_submodule(layer_forms.ATTENTION).config._attn_implementation}
        attentions = frozenset(proven | {"eager", "sdpa"})
        step = prepare(layer, found.widened(), layout, attentions)
        if not _is_the_hosts(layer, host, replace(step, chosen=None)):
            reasons["the host's own numbers are others"] += 1
            continue
        put_in_front(FusedLayer, layer)
        layer.__dict__["_ffn_layout"] = layout
        layer.__dict__["_attentions"] = attentions
        fused += 1
    why = "".join(f"; {count} are not: {reason}" for reason, count in reasons.items())
    if fused or why:
        _log.info("%s: %d layers are fused%s", type(model).__name__, fused, why)


@torch.no_grad()
def _is_the_hosts(layer: nn.Module, host: type[nn.Module], step: Step) -> bool:
    """Whether a step gives the numbers of its host: two sequences, some positions in the cache.

    In fp32, whatever the weights are, so that nobody's roundings hide a difference. Experts that
    are chosen are left out of it: a near tie would choose others.
    """
    drawn = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float32)

    sizes = step.native.attention
    h_B1D, angles = random(2, 1, sizes.q.width), random(2, 1, sizes.head // 2)
    turned = torch.cat([angles, angles], dim=-1)
    cached = [random(2, sizes.key_heads, 5, sizes.head) for _ in range(2)]
    on = torch.tensor([[[[False, True, True, True, False, True]]]] * 2)
    # in numbers, which every attention adds; "eager" would add a bool as 1
    none = torch.zeros(on.shape, dtype=torch.float32)
    masked = none.masked_fill(~on, torch.finfo(torch.float32).min)
    ffn = layer.get_submodule(layer_forms.FFN)
    with _passing(ffn) if step.native.ffn is None else nullcontext():
        for mask in (None, masked):
            caches = [_cache_of(cached, step.index) for _ in range(2)]
            ours, theirs = (
                {
                    "attention_mask": mask,
                    "position_embeddings": (turned.cos(), turned.sin()),
                    "position_ids": torch.tensor([[5], [5]]),
                    "past_key_values": cache,
                }
                for cache in caches
            )
            try:
                expected = host.forward(layer, h_B1D, **theirs)
            except Exception:  # it wants more than a token
                return False
            pairs = [(step(layer, h_B1D, ours), expected)]
            one, other = (cast("Any", cache.layers[step.index]) for cache in caches)
            pairs += [(one.keys, other.keys), (one.values, other.values)]
            if not all(_are_near(*pair, _tolerance(step.native)) for pair in pairs):
                return False
    return True


@contextmanager
def _passing(ffn: nn.Module) -> Iterator[None]:
    """Lets an FFN give what it was given; its own linears would not take fp32 from a bf16 model."""
    before = ffn.__dict__.get("forward")
    ffn.__dict__["forward"] = lambda x_TD: x_TD
    try:
        yield
    finally:
        del ffn.__dict__["forward"]
        if before is not None:
            ffn.__dict__["forward"] = before


def _cache_of(cached: Sequence[Tensor], index: int) -> DynamicCache:
    cache = DynamicCache()
    for each in range(index + 1):
        cache.update(cached[0], cached[1], each)
    return cache


def _tolerance(native: CpuDecoderLayer) -> float:
    return NEAR_FLOATS if all(one.dtype in FLOATS for one in native.linears()) else NEAR_CODES


def _are_near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    most = tolerance * float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= most
