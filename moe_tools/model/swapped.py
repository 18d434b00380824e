"""A model with another activation: in its FFNs, and in its config under a name that says so.

What transformers knows goes under its name into the host's config: the stock class loads the folder
and computes the same. For any other activation the config gets a name that no stock class knows:
it refuses the folder and names moe-tools, while `load` builds the host under its last stock name
and swaps again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moe_tools.model.activations import Activation, build_activation
from moe_tools.model.conversion import Conversion, read_conversion, write_conversion
from moe_tools.model.ffn import FFN, check_activation, find_ffns, set_activation
from moe_tools.model.layouts import ALSO_ACTIVATED

FOREIGN = "moe_tools.{}: load this folder with moe_tools.load"
"""What stands in the host's config for an activation of a kind that transformers lacks."""


def swap_activations(model: nn.Module, conversion: Conversion) -> None:
    """Gives every FFN of a dense model the conversion's activation, in place.

    Where the same key of the host's config names an activation outside the FFNs, too (the head of
    a masked BERT), a stock activation goes there as well, as the stock class will have it.

    Raises:
        ValueError: no or an unknown activation, one that an FFN cannot have, the activation of an
            FFN that is not there, or a routed model.
    """
    found = find_ffns(model)
    conversion.check_names(found)
    acts = [_activation(ffn, conversion) for ffn in found]
    for ffn, act in zip(found, acts, strict=True):  # first all checks, then the first change
        check_activation(ffn, act)
    for ffn, act in zip(found, acts, strict=True):
        set_activation(model, ffn, act)
    assert conversion.activation is not None
    kind = conversion.activation["kind"]
    in_stock = acts[0].in_stock and not conversion.activation_of
    if in_stock:
        _set_elsewhere(model, conversion.activation)
    name = kind if in_stock else FOREIGN.format(kind)
    before = found[0].layout.name_activation(model.config, name)
    stock = None if in_stock else _stock_name(model, before)
    write_conversion(model, replace(conversion, stock_activation=stock))


def _stock_name(model: nn.Module, before: str) -> str | None:
    """The name in the host's config, or the one that the last swap took from there."""
    if not before.startswith("moe_tools."):
        return before
    made = read_conversion(model)
    return None if made is None else made.stock_activation


def restore_stock_name(config: Any, conversion: Conversion | None) -> None:
    """Puts back into a host's config the activation that the stock class can be built with."""
    if conversion is None or conversion.activation is None or conversion.stock_activation is None:
        return
    name = FOREIGN.format(conversion.activation["kind"])
    for key, value in list(vars(config).items()):
        if isinstance(value, str) and name in value:
            setattr(config, key, value.replace(name, conversion.stock_activation))


def _activation(ffn: FFN, conversion: Conversion) -> Activation:
    return build_activation(conversion.activation_of.get(ffn.name, conversion.activation or {}))


def _set_elsewhere(model: nn.Module, spec: dict[str, Any]) -> None:
    for module in list(model.modules()):
        path = ALSO_ACTIVATED.get(type(module).__name__)
        if path is not None:
            module.set_submodule(path, build_activation(spec))
