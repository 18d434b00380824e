"""The FFNs that no shape fits, found in a shrunk twin of the model by its autograd graph.

Letters: B blocks, T tokens of a block.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tools.hosts.finder.find import find_layouts
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.linears import widths
from moe_tools.hosts.twin import build_twin, shrink

SMALL = 2_000_000
"""Parameters up to which a model is its own twin."""
NOISE = 0.1
FFN_NAMES = re.compile("mlp|ffn|feed_?forward|expert", re.IGNORECASE)

_log = logging.getLogger(__name__)
_FOUND: WeakKeyDictionary[nn.Module, dict[str, Layout]] = WeakKeyDictionary()


def may_have_more(model: nn.Module, known: set[str]) -> bool:
    """Whether a model may have FFNs beside the known holders.

    It may where a layer has none although others of its list do, where there is none at all, and
    where a module is called like one and has linears of its own.
    """
    if not known:
        return True
    covered = known | {above for path in known for above in _above(path)}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            layers = [
                f"{path}.{i}"
                for i, layer in enumerate(module)
                if next(layer.parameters(), None) is not None
            ]
            if any(layer in covered for layer in layers) and not covered.issuperset(layers):
                return True
        elif (
            _is_called_ffn(path, module)
            and path not in covered
            and covered.isdisjoint(_above(path))
        ):
            return True
    return False


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that a module is in."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _is_called_ffn(path: str, module: nn.Module) -> bool:
    named = FFN_NAMES.search(f"{path.rpartition('.')[2]} {type(module).__name__}")
    return bool(named) and sum(widths(child) is not None for child in module.children()) > 1


def graph_rows(model: nn.Module) -> dict[str, Layout]:
    """Path of a holder -> its layout, for what the graph of a twin shows; empty without a twin."""
    if model not in _FOUND:
        twin = _noisy(model) if _is_small(model) else stock_twin(model)
        _FOUND[model] = {} if twin is None else everywhere(model, twin, _find(twin))
    return dict(_FOUND[model])


def everywhere(model: nn.Module, twin: nn.Module, rows: Mapping[str, Layout]) -> dict[str, Layout]:
    """The rows of a twin, each for every holder of its class in the same place of any layer."""
    by_place = {
        (place_of(path), type(twin.get_submodule(path)).__name__): layout
        for path, layout in rows.items()
    }
    places = ((path, (place_of(path), type(each).__name__)) for path, each in model.named_modules())
    return {path: by_place[place] for path, place in places if place in by_place}


def _find(twin: nn.Module) -> dict[str, Layout]:
    config: Any = twin.config
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    ids_BT = torch.arange(2 * 12).view(2, 12) * 7 % (vocabulary - 4) + 3
    try:
        with torch.enable_grad():
            return find_layouts(twin, model_inputs(twin, ids_BT)).rows
    except Exception as error:  # a foreign model fails in its own ways
        _log.debug("%s: no graph to look at: %s", type(twin).__name__, error)
        return {}


def _is_small(model: nn.Module) -> bool:
    """Whether a model can be its own twin."""
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    whole = _is_stock(type(model))
    return whole and size <= SMALL and not any(parameter.is_meta for parameter in parameters)


def stock_twin(model: nn.Module) -> nn.Module | None:
    """A small model of the same class, whole where this one is a part of a model; None: no way."""
    stock = next((each for each in type(model).__mro__ if _is_stock(each)), None)
    if stock is None:
        return None
    config: Any = model.config
    try:
        return build_twin(stock, shrink(config))
    except ValueError as error:
        _log.debug("%s", error)
        return None


def _is_stock(kind: type) -> TypeGuard[type[PreTrainedModel]]:
    """Whether a class of models is one that its module defines: a part's is made for it."""
    if not issubclass(kind, PreTrainedModel):
        return False
    return vars(sys.modules[kind.__module__]).get(kind.__name__) is kind


def _noisy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).float().eval().requires_grad_()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=draw))
    config: Any = twin.config
    config.use_cache = False
    return twin


def place_of(path: str) -> str:
    """A path without the numbers in it."""
    return re.sub(r"\d+", "*", path)
