"""Which keys of a host's config name an activation, found by trial."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

OTHERS = ("tanh", "relu", "silu")
"""Names that a config is given in place of its own: of the hosts' tables, some have few."""


def activation_keys(model_class: type[Any], config: PreTrainedConfig) -> dict[str, list[str]]:
    """The keys of a config that name an activation, found by changing each.

    Args:
        model_class: is built on the meta device, once and again for every such string.
        config: is left as it is.

    Returns:
        Dotted key -> paths of the modules whose class changes with it.
    """
    before = _module_types(model_class, config)
    found = {}
    for key in _activation_strings(config):
        for name in OTHERS:
            try:
                after = _module_types(model_class, _with_activation(config, key, name))
            except Exception:  # a host with a table of its own, or another word for this string
                continue
            changed = [path for path, kind in after.items() if before.get(path) is not kind]
            if changed:
                found[key] = changed
                break
    return found


def _activation_strings(config: PreTrainedConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in vars(config).items():
        if isinstance(value, str) and value in ACT2FN:
            keys.append(prefix + key)
        elif isinstance(value, PreTrainedConfig):
            keys += _activation_strings(value, f"{prefix}{key}.")
    return keys


def _with_activation(config: PreTrainedConfig, key: str, name: str) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    *parents, last = key.split(".")
    owner: Any = changed
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, last, name)
    return changed


def _module_types(model_class: type[Any], config: PreTrainedConfig) -> dict[str, type[nn.Module]]:
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
