"""What a row says of its holder, tried: a module is run, or its numbers are changed for a moment.

Letters: D model width, F neurons of one FFN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.finder.tracing import Inputs
from moe_tools.hosts.layouts import Layout, join
from moe_tools.hosts.projections import Projections, hidden_TF


def is_whole(holder: nn.Module, layout: Layout, x: Tensor) -> bool:
    """Whether a holder does nothing but its row: on random numbers, as many as `x` has.

    What it should give is computed from the tensors, not by its linears.
    """
    if not _takes_one(holder):
        return False
    for shape in (x.shape, (2, 5, x.shape[-1])):
        fresh = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x)
        y = _attempt(holder, fresh)
        if y is not None:
            ours = _computed(holder, layout, fresh)
            return y.shape == ours.shape and close(y, ours)
    return False


def casts_down(holder: nn.Module, layout: Layout, x: Tensor) -> bool:
    """Whether a whole holder casts h to the dtype of its down projection, if that has another."""
    down, dtype = holder.get_submodule(layout.down), x.dtype
    try:
        down.to(torch.float64)
        return _attempt(holder, torch.ones_like(x)) is not None
    finally:
        down.to(dtype)


def with_proven_slots(
    model: nn.Module, inputs: Inputs, rows: dict[str, Layout]
) -> dict[str, Layout]:
    """Rows of FFNs in a layer, their slots tried together: the model has to give what it gave.

    Where it does not, each is tried alone, and those at fault are masked.
    """
    spread = {holder: layout for holder, layout in rows.items() if layout.bypass}
    if not spread:
        return rows
    before = _output(model, inputs)
    assert before is not None
    if _same_with_slots(model, inputs, spread, before):
        return rows
    proven = dict(rows)
    for holder, layout in spread.items():
        if not _same_with_slots(model, inputs, {holder: layout}, before):
            masked = replace(layout, act=None, function=None, bypass=(), masked=True)
            proven[holder] = replace(masked, slot=layout.down)
    return proven


class _InSlot(nn.Module):
    """The plain FFN of a row."""

    def __init__(self, holder: nn.Module, layout: Layout) -> None:
        super().__init__()
        assert layout.act is not None
        self.parts = nn.Sequential(
            *(holder.get_submodule(path) for path in (layout.up, layout.act, layout.down))
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.parts(x_TD)


def _same_with_slots(
    model: nn.Module, inputs: Inputs, rows: dict[str, Layout], before: Tensor
) -> bool:
    old: list[tuple[str, nn.Module]] = []
    try:
        for holder, layout in rows.items():
            ours = _InSlot(model.get_submodule(holder), layout).eval()
            new = {layout.slot: ours, **{path: nn.Identity() for path in layout.bypass}}
            for path, module in new.items():
                old.append((join(holder, path), model.get_submodule(join(holder, path))))
                model.set_submodule(join(holder, path), module)
        after = _output(model, inputs)
        return after is not None and after.shape == before.shape and close(after, before)
    finally:
        for path, module in old:
            model.set_submodule(path, module)


def _takes_one(holder: nn.Module) -> bool:
    """Whether a forward pass has one argument that has to be given."""
    parameters = inspect.signature(holder.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return sum(parameter.default is parameter.empty for parameter in named) == 1


@torch.no_grad()
def _attempt(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor | None:
    """The tensor that a foreign module gives; None: another thing, or it fails."""
    try:
        y = module(*args, **kwargs)
    except Exception:  # whatever it raises says that it is not called like this
        return None
    return y if isinstance(y, Tensor) else None


def _output(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """The first tensor of a model's output: its logits."""

    def run() -> Any:
        out = model(**inputs)
        while not isinstance(out, Tensor):
            out = next(iter(out.values() if isinstance(out, dict) else out))
        return out

    return _attempt(run)


def _computed(holder: nn.Module, layout: Layout, x_TD: Tensor) -> Tensor:
    """y_TD from the tensors of a row's parts."""
    parts = Projections.of(layout, holder.get_submodule)
    up_TF, gate_TF = _linear(parts.up, x_TD), None
    if parts.gate is parts.up:
        gate_TF, up_TF = parts.halves(up_TF, dim=-1)
    elif parts.gate is not None:
        gate_TF = _linear(parts.gate, x_TD)
    return _linear(parts.down, hidden_TF(parts.act, up_TF, gate_TF))


@torch.no_grad()
def _linear(module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    if isinstance(module, Conv1D):
        return x @ weight + module.get_parameter("bias")
    return module(x)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding only, seen from the largest number."""
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())
