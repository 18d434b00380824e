"""A model with another activation: in its FFNs, and in its config under a name that says so.

What transformers knows goes under its name into the host's config: the stock class loads the folder
and computes the same. For any other activation the config gets a name that no stock class knows:
it refuses the folder and names moe-tools. Where moe-tools is imported, it is built with `Unswapped`
instead, and the loading swaps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_tools.experts.conversion import (
    Conversion,
    read_conversion,
    with_layouts,
    write_conversion,
)
from moe_tools.hosts.activation_keys import activation_keys, read_key, write_key
from moe_tools.hosts.activations import Activation, build_activation
from moe_tools.hosts.ffn import FFN, check_activation, find_ffns, set_activation, unfused_ffns
from moe_tools.hosts.host_expert import OneExpert
from moe_tools.hosts.layouts import holder_of, join
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.names import OURS

FOREIGN = OURS + "{}: load this folder with moe_tools.load"
"""What stands in the host's config for an activation of a kind that transformers lacks."""


def swap_activations(model: nn.Module, conversion: Conversion) -> None:
    """Gives every FFN of a dense model the conversion's activation, in place.

    Where the same key of the host's config names an activation outside the FFNs, too (the head of
    a masked BERT), a stock activation goes there as well, as the stock class will have it.

    Raises:
        ValueError: no or an unknown activation, one that an FFN cannot have, the activation of an
            FFN that is not there, one that the host's config does not name, or a routed model.
    """
    conversion = with_layouts(model, conversion)
    acts = check_swap(model, conversion)
    keys = _keys(model, find_ffns(model))
    found = unfused_ffns(model)
    for ffn, act in zip(found, acts, strict=True):
        set_activation(model, ffn, act)
    assert conversion.activation is not None
    kind = conversion.activation["kind"]
    in_stock = acts[0].in_stock and not conversion.activation_of
    if in_stock:
        _set_elsewhere(model, set().union(*keys.values()), found, conversion.activation)
    before = {read_key(model.config, key) for key in keys}
    for key in keys:
        write_key(model.config, key, kind if in_stock else FOREIGN.format(kind))
    stock = None if in_stock else _stock_name(model, before.pop())
    write_conversion(model, replace(conversion, stock_activation=stock))


def _keys(model: nn.Module, ffns: Sequence[FFN]) -> dict[str, set[str]]:
    """The keys of the config that name the FFNs' activations -> what else they name as well.

    Raises:
        ValueError: there is none, or they name several activations: no config could say the swap.
    """
    acts = {_act_path(model, ffn) for ffn in ffns}
    keys = {
        key: named
        for key, named in activation_keys(model).items()
        if any(path.startswith(act) for act in acts for path in named)
    }
    named = set().union(*keys.values()) if keys else set()
    config = type(model.config).__name__
    for act in acts:
        if not any(path.startswith(act) for path in named):
            raise ValueError(f"{act} cannot be swapped: no key of {config} names its activation")
    names = {read_key(model.config, key) for key in keys}
    if len(names) > 1:
        raise ValueError(f"{config} names several activations: {', '.join(sorted(names))}: no swap")
    return keys


def _act_path(model: nn.Module, ffn: FFN) -> str:
    """Where the activation is in the stock model; of an expert, below what holds them all."""
    above = ffn.name.rpartition(".")[0]
    if isinstance(ffn.layer, OneExpert) or isinstance(model.get_submodule(above), HostExperts):
        return f"{above}."
    return join(holder_of(ffn.name, ffn.layout), ffn.layout.act or "")


def check_swap(model: nn.Module, conversion: Conversion) -> list[Activation]:
    """The activations of a model's FFNs under a conversion; the model stays as it is.

    Raises:
        ValueError: as `swap_activations`.
    """
    found = find_ffns(model)
    conversion.check_names(found)
    acts = [_activation(ffn, conversion) for ffn in found]
    for ffn, act in zip(found, acts, strict=True):
        check_activation(ffn, act)
    return acts


def _stock_name(model: nn.Module, before: str) -> str | None:
    """The name in the host's config, or the one that the last swap took from there."""
    if not before.startswith(OURS):
        return before
    made = read_conversion(model)
    return None if made is None else made.stock_activation


class Unswapped(nn.Module):
    """Stands where a stock class is built with an activation that it does not know."""

    def forward(self, x_TF: Tensor) -> Tensor:
        """Never what the model computes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "this model was built from the config of a converted one, without its folder: load it "
            "with from_pretrained"
        )


def replace_stand_ins(model: nn.Module, stock_activation: str | None) -> None:
    """Puts the activation of the stock class wherever it was built with `Unswapped`.

    Raises:
        ValueError: the config names an activation of ours, but not what it replaced.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Unswapped):
            if stock_activation is None:
                raise ValueError(
                    f"{path} has an activation that only moe-tools knows, but the moe_tools block "
                    "of config.json lacks stock_activation"
                )
            model.set_submodule(path, ACT2FN[stock_activation])


def _activation(ffn: FFN, conversion: Conversion) -> Activation:
    return build_activation(conversion.activation_of.get(ffn.name, conversion.activation or {}))


def _set_elsewhere(
    model: nn.Module, named: set[str], ffns: Sequence[FFN], spec: dict[str, Any]
) -> None:
    """Activates what else the key names, as the stock class will."""
    acts = tuple(_act_path(model, ffn) for ffn in ffns)
    there = {path for path, _ in model.named_modules()}
    for path in named & there:
        if not path.startswith(acts):
            model.set_submodule(path, build_activation(spec))
