"""Which keys of a host's config name the activation of its FFNs: found by trying.

A model of the same class is built without numbers, once as it is and once for every key that names
an activation, with another name there: the modules whose class changes are those it names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from moe_tools.names import OURS

TRIED = ("relu6", "tanh", "relu", "silu")
"""Names that a config is given in place of its own: some hosts have a table of few."""
SOURCES = {"dense_act_fn": "feed_forward_proj"}
"""A key of T5's that reading a config computes anew -> what it is computed from: "relu" or
"gated-gelu"."""


def activation_keys(model: nn.Module) -> dict[str, set[str]]:
    """Key of the config, dotted where it is in a part of it -> paths of the modules it names."""
    config: Any = model.config
    before = _classes(model, config)
    named = {key: _changed(model, config, key, before) for key in _candidates(config)}
    return {key: changed for key, changed in named.items() if changed}


def _changed(model: nn.Module, config: Any, key: str, before: dict[str, type]) -> set[str]:
    """The modules whose class is another when a key names another activation."""
    for name in TRIED:
        if name != read_key(config, key):
            tried = copy.deepcopy(config)
            _write(tried, key, name)
            try:
                after = _classes(model, tried)
            except Exception:  # a table of its own that lacks it, or a key of something else
                continue
            changed = {path for path, kind in before.items() if after.get(path) is not kind}
            if changed:
                return changed
    return set()


def read_key(config: Any, key: str) -> str:
    """What a config names under a dotted key."""
    name: str = attrgetter(key)(config)
    return name


def write_key(config: Any, key: str, name: str) -> None:
    """Writes the name of an activation into a config, so that a folder keeps it.

    Raises:
        ValueError: reading the config from a file would not give it back.
    """
    _write(config, key, name)
    source = SOURCES.get(key)
    if source is not None:
        gated = str(getattr(config, source)).startswith("gated-")
        setattr(config, source, f"gated-{name}" if gated else name)
    again = type(config).from_dict(config.to_dict())
    if read_key(again, key) != name:
        raise ValueError(f"{type(config).__name__} computes {key} from another key: no swap")


def _candidates(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys with the name of an activation, of transformers or ours."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _candidates(value, f"{prefix}{key}.")
        elif isinstance(value, str) and (value in ACT2FN or value.startswith(OURS)):
            yield prefix + key


def _write(config: Any, key: str, name: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, last, name)


def _classes(model: nn.Module, config: Any) -> dict[str, type]:
    """Path -> class of every module of a model like this one."""
    plain = copy.deepcopy(config)
    plain.moe_tools = None
    with torch.device("meta"):
        built = type(model)(plain)
    return {path: type(module) for path, module in built.named_modules(remove_duplicate=False)}
