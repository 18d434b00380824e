"""Which FFNs a model has: the layout of every holder, by its path.

A converted model's `config.json` says it (the `layouts` of its block), and nothing is looked for
again. Of a dense model it is found by shape or by graph, as long as `moe_tools.hosts.proof` has not
settled it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from moe_tools.hosts.fused import fused_experts
from moe_tools.hosts.graph_rows import graph_rows, may_have_more
from moe_tools.hosts.layouts import Layout, join
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.shapes import FORMAT_1, NO_FFN, fit

Rows = dict[str, Layout]
"""Path of a holder -> its layout, in the host's order."""

_SETTLED: WeakKeyDictionary[nn.Module, Rows] = WeakKeyDictionary()
"""What was proven of models that are still dense."""


def rows_of(model: nn.Module) -> Rows:
    """The layout of every holder of a model that is not grafted yet.

    Raises:
        ValueError: a config whose layouts cannot be read.
    """
    block = _block(model)
    if block is not None:
        written = block.get("layouts")
        return rows_by_shape(model, FORMAT_1) if written is None else read_rows(model, written)
    return _SETTLED[model] if model in _SETTLED else found_rows(model)


def found_rows(model: nn.Module) -> Rows:
    """The holders of a dense model by shape, and where that may miss some, by graph as well.

    Raises:
        ValueError: as `fit`.
    """
    by_shape = rows_by_shape(model)
    opened = [path for path, module in model.named_modules() if isinstance(module, HostExperts)]
    if not may_have_more(model, {*by_shape, *fused_experts(model), *opened}):
        return by_shape
    known = {join(path, layout.up) for path, layout in by_shape.items()}
    inside = tuple(f"{path}." for path in opened)  # experts that were taken apart say what they are
    return by_shape | {
        path: row
        for path, row in graph_rows(model).items()
        if join(path, row.up) not in known and not path.startswith(inside)
    }


def settled(model: nn.Module) -> bool:
    """Whether a model's rows are proven, or were when its folder was written."""
    return _block(model) is not None or model in _SETTLED


def _block(model: nn.Module) -> dict[str, Any] | None:
    """What a model's config says of its conversion; None: the model is dense."""
    block = getattr(getattr(model, "config", None), "moe_tools", None)
    return block if isinstance(block, dict) else None


def settle_rows(model: nn.Module, rows: Rows) -> None:
    """Keeps the proven rows of a dense model for as long as the model lives."""
    _SETTLED[model] = rows


def rows_by_shape(model: nn.Module, classes: Collection[str] = ()) -> Rows:
    """The holders of a known shape, in what reads text.

    Args:
        model: dense.
        classes: the only ones to look at; empty: any.

    Raises:
        ValueError: as `fit`.
    """
    rows: Rows = {}
    _walk("", model, classes, rows, top=True)
    return rows


def _walk(path: str, module: nn.Module, classes: Collection[str], rows: Rows, *, top: bool) -> None:
    ours = isinstance(module, HostExperts)
    if ours or _is_no_ffn(module) or not (top or _reads_text(module)):
        return
    name = type(module).__name__
    layout = fit(module) if not classes or name in classes else None
    if layout is not None:
        rows[path] = layout
    for child, below in module.named_children():
        _walk(f"{path}.{child}".removeprefix("."), below, classes, rows, top=False)


def _reads_text(module: nn.Module) -> bool:
    """False for a model inside another that takes pictures or sound: its FFNs stay dense."""
    if not isinstance(module, PreTrainedModel) or module.main_input_name == "input_ids":
        return True
    tokens = getattr(module.config, "vocab_size", 0)
    tables = (each for each in module.modules() if isinstance(each, nn.Embedding))
    return any(table.num_embeddings == tokens for table in tables)


def _is_no_ffn(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in NO_FFN)


def write_rows(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The rows of a model as plain data: by the class of the holders where it says all.

    Where modules of a class differ, or are no holders, each row goes by its path.
    """
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    written: dict[str, Any] = {}
    for path, layout in rows.items():
        found = {rows.get(other) for other, name in classes.items() if name == classes[path]}
        written[classes[path] if found == {layout} else path] = layout.to_dict()
    return written


def read_rows(model: nn.Module, written: Mapping[str, Any]) -> Rows:
    """The rows of `write_rows` on the holders of a model; a path goes before a class.

    Raises:
        ValueError: no layout, see `Layout.from_dict`.
    """
    known = {name: Layout.from_dict(row) for name, row in written.items()}
    rows = {
        path: known.get(path) or known.get(type(module).__name__)
        for path, module in model.named_modules()
    }
    return {path: layout for path, layout in rows.items() if layout is not None}
