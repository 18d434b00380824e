"""What PowerInfer computes, and why it cannot compute some model as ours; by the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_tools.checkpoint.plain import quantised_by
from moe_tools.experts.conversion import Conversion
from moe_tools.export.source import Source
from moe_tools.registry import short

HOSTS = ("llama", "mistral")
ARCHS = {"relu": "llama", "drelu": "bamboo"}
"""Activation -> the architecture whose sparse FFN computes it."""
FEWEST = 1000
"""A predictor of up to so many outputs is taken for one of attention heads (ggml.c,
`tensor->src[2]->ne[0] > 1000`)."""
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
TRAIN = (
    "train predictors of single neurons with `attach: {router: low_rank, router_options: "
    "{bias: false}, selector: {kind: threshold, tau: 0.5}}`"
)
SWAP = "`swap: {activation: {kind: relu}}`, train, and only then fit predictors"
OTHERS = "serve the folder itself, by moe-tools"


class Told(NamedTuple):
    """What a config says in more than one way."""

    arch: str
    groups: int
    """Heads of k and v."""
    rank: int
    """Units between the layers of a predictor."""


def told(source: Source) -> Told:
    """Of a model that `reason` has nothing against."""
    assert source.conversion is not None
    activation, rank = _activations(source).pop(), source.conversion.router_options.get("rank", 128)
    return Told(ARCHS[activation], _groups(source.config), rank)


def reason(source: Source) -> str | None:
    """Returns why a model cannot be written, and the way out; None when it can."""
    if source.conversion is None:
        return f"it was not converted, and has no predictors: {TRAIN}"
    found = (*_of_host(source.config), *_of_routing(source.conversion), *_of_activation(source))
    return next(iter(found), None)


def _of_host(config: Any) -> Iterator[str]:
    """Attention and sizes."""
    if config.model_type not in HOSTS:
        yield f"it is a {config.model_type}, and PowerInfer knows our llamas: {OTHERS}"
        return
    for name in SIZES:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            yield f"{name} is {short(value)}, which is no number from 1: correct config.json"
            return
    method = quantised_by(config)
    if method is not None:
        plain = "`moe_tools.save(moe_tools.load(SOURCE), FOLDER)`"
        yield f"its weights are quantised ({short(method)}), not plain: write plain ones by {plain}"
    eps = config.rms_norm_eps
    if not _is_positive(eps):
        yield f"rms_norm_eps is {short(eps)}, which is no number above 0: correct config.json"
    for name in ("attention_bias", "mlp_bias", "sliding_window"):
        if getattr(config, name, None):
            yield f"it has {name} {getattr(config, name)}, which PowerInfer leaves out: {OTHERS}"
    yield from _of_rope(config.rope_parameters)
    width, heads, groups = config.hidden_size, config.num_attention_heads, _groups(config)
    head = getattr(config, "head_dim", None) or width // heads
    if heads * head != width:
        yield f"it has {heads} heads of {head}, and PowerInfer {width} / {heads} in each: {OTHERS}"
    if type(groups) is not int or groups < 1 or heads % groups:
        yield f"num_key_value_heads is {short(groups)}, no divisor of {heads}: correct config.json"
    neurons = config.intermediate_size
    if neurons <= FEWEST:
        yield (
            f"it has {neurons} neurons an FFN, and PowerInfer takes predictors of {FEWEST} or "
            f"fewer for those of attention heads: {OTHERS}"
        )


def _of_rope(rope: Any) -> Iterator[str]:
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default":
        yield f"it has rope scaling of type {short(kind)}, and PowerInfer plain rope: {OTHERS}"
    if part != 1.0:
        yield f"it rotates {short(part)} of each head, and PowerInfer all of it: {OTHERS}"
    theta = rope.get("rope_theta")
    if not _is_positive(theta):
        yield f"rope_theta is {short(theta)}, which is no number above 0: correct config.json"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _of_routing(block: Conversion) -> Iterator[str]:
    """Predictors, and what selects by them."""
    if block.router is None:
        yield f"it has no predictors: {TRAIN}"
        return
    if block.router != "low_rank":
        yield f"it has a router {short(block.router)}, and PowerInfer two-layer predictors: {TRAIN}"
    if block.expert_size != 1:
        yield f"it has experts of {block.expert_size} neurons, and PowerInfer single ones: {TRAIN}"
    options = block.router_options
    if options.get("bias", True) is not False:
        yield f"its predictors have a bias, for which PowerInfer has no place: {TRAIN}"
    rank = options.get("rank", 128)
    if type(rank) is not int or rank < 1:
        yield f"its predictors have the rank {short(rank)}, no number from 1: correct config.json"
    for selector in (block.selector or {}, *block.selector_of.values()):
        if selector.get("kind") != "threshold" or selector.get("tau", 0.5) != 0.5:
            where = " in some FFNs" if block.selector_of else ""
            yield (
                f"its selector is {short(selector)}{where}, and PowerInfer asks for the sign of "
                f"what tau 0.5 asks for: {TRAIN}"
            )
    yield from _of_ffns(block)


def _of_ffns(block: Conversion) -> Iterator[str]:
    """What else our FFNs compute."""
    if block.shared_experts:
        yield f"{block.shared_experts} neurons always run, and in PowerInfer none does: {TRAIN}"
    if block.when_off != "zero":
        yield f"a neuron that is off gives its {block.when_off}, and in PowerInfer 0: {TRAIN}"
    if block.mode != "hard":
        way = 'give it the mode hard by `moe_tools.set_mode(model, "hard")`, and save it'
        yield f"its mode is {block.mode}, and in PowerInfer a neuron runs or not: {way}"
    if block.constants:
        way = "export the folder from before `refit`, or refit with `constants: false`"
        yield f"it adds constants, for which PowerInfer has no place: {way}"
    if block.thresholds is not None:
        way = "export the folder from before `threshold`"
        yield f"it drops inputs of {len(block.thresholds)} linears, and PowerInfer none: {way}"


def _of_activation(source: Source) -> Iterator[str]:
    kinds = _activations(source)
    if len(kinds) > 1:
        found = " and ".join(sorted(kinds))
        yield f"its FFNs have the activations {found}, and in PowerInfer all have one: {SWAP}"
    elif not kinds <= ARCHS.keys():
        yield (
            f"it has the activation {short(kinds.pop())}, and PowerInfer computes "
            f"{' and '.join(ARCHS)}: {SWAP}"
        )


def _activations(source: Source) -> set[str]:
    """What the FFNs compute."""
    block = source.conversion
    if block is None or block.activation is None:
        return {str(source.config.hidden_act)}
    return {str(each["kind"]) for each in (block.activation, *block.activation_of.values())}


def _groups(config: Any) -> Any:
    """Heads of k and v."""
    groups = getattr(config, "num_key_value_heads", None)
    return config.num_attention_heads if groups is None else groups
