"""Finds the FFNs of a model without their names, and says each as a `Layout`.

The model is a small one: a twin of the real one, in fp32, with noise on every parameter. A passage
(`tracing`) is an FFN if

- it leads from the width of the model to the width of the model,
- its sources read the same tensor, and
- another order of its neurons changes no result. A norm with a weight over the neurons fails here.

An activation alone does not tell an FFN from a bottleneck (an adapter, a gate of low rank): a
passage with fewer neurons than the model is wide is dropped where its layer has a larger one. What
stands in one module with the output embeddings is a head.

Letters: N tokens of one call, D model width, F neurons, W width of a source (F or 2F).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe_tools.hosts.finder.cutting import LEAST_TOKENS, Cut, Pointwise, cut
from moe_tools.hosts.finder.dropouts import with_dropouts
from moe_tools.hosts.finder.formulas import Formula, equal, formula_of, functions
from moe_tools.hosts.finder.tracing import Call, Inputs, Passage, affine_calls, passages
from moe_tools.hosts.finder.trials import casts_down, is_whole, with_proven_slots
from moe_tools.hosts.layouts import Layout, join

FEW = f"fewer than {LEAST_TOKENS} tokens reached it"
"""A reason."""
WIDTHS = ("hidden_size", "true_hidden_size")
"""Keys of the model's width; transformers maps other names to the first. MobileBERT has both."""
TRIES = 3
"""Passes with other random numbers, for experts that got no token in the first."""


@dataclass(frozen=True)
class Found:
    """What is known about the FFNs of a model."""

    rows: dict[str, Layout] = field(default_factory=dict)
    """Path of the holder -> where its parts are."""
    refused: dict[str, str] = field(default_factory=dict)
    """Path of the holder of what looks like an FFN -> why it cannot be a row."""


def find_layouts(model: nn.Module, inputs: Inputs) -> Found:
    """Finds the FFNs that run in one forward pass, proves them, and changes nothing.

    Args:
        model: a small one in eval mode and fp32, with noise on every parameter: a bias that is
            zero, or two equal rows, would prove nothing.
        inputs: keyword arguments of its forward pass, with a dozen tokens or more: a part of them
            reaches an expert.

    Raises:
        ValueError: the model is in train mode, where dropout hides the formula.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in train mode: call model.eval() first")
    calls = affine_calls(model, inputs)
    found = _as_wide_as_the_model(passages(calls), _widths(model, calls))
    found = _without_heads(model, _without_bottlenecks(found))
    cuts, pointwise = _cut_all(model, inputs, found)
    known = functions()
    rows: dict[str, Layout] = {}
    refused: dict[str, str] = {}
    for passage in found:
        made = cuts.get(passage.down.path)
        if made is not None and passage.coupled and made.odd:
            continue  # a norm and no activation: queries of low rank
        reason = _refusal(passage, made)
        if made is None or reason is not None:
            refused[_holder(passage)] = reason or FEW
            continue
        own = [each for each in pointwise if _is_own(passage, each.path, found)]
        formula = formula_of(passage, made, own, known)
        holder = _holder(passage, None if formula is None else formula.act)
        if holder in rows:
            refused[join(holder, passage.down.path)] = "its holder has another FFN"
        else:
            rows[holder] = _row(model, holder, passage, formula)
    refused = {  # an FFN's parts stand together: what has others in between is none
        holder: reason
        for holder, reason in refused.items()
        if not any(_contains(holder, row) for row in rows if row != holder)
    }
    rows = with_proven_slots(model, inputs, rows)
    return Found(with_dropouts(model, inputs, rows), refused)


def _widths(model: nn.Module, calls: list[Call]) -> set[int]:
    """The hidden sizes of the config and of those within; else what most linears take or return."""
    config = getattr(model, "config", None)
    sizes = {getattr(each, name, None) for each in _configs(config) for name in WIDTHS}
    known = {size for size in sizes if isinstance(size, int)}
    counts = Counter(width for call in calls for width in (call.width, call.out.shape[-1]))
    return known or {width for width, _ in counts.most_common(1)}


def _configs(config: Any) -> list[PreTrainedConfig]:
    if not isinstance(config, PreTrainedConfig):
        return []
    return [config, *(sub for value in vars(config).values() for sub in _configs(value))]


def _as_wide_as_the_model(found: list[Passage], widths: set[int]) -> list[Passage]:
    """From the width of the model to the width of the model."""
    return [
        passage
        for passage in found
        if (width := passage.down.out.shape[-1]) in widths
        and any(source.width == width for source in passage.sources)
    ]


def _without_bottlenecks(found: list[Passage]) -> list[Passage]:
    """Without what has fewer neurons than the model is wide, next to a larger one in its layer.

    The experts of a list are no bottlenecks, however small.
    """
    return [
        passage
        for passage in found
        if passage.down.width >= passage.down.out.shape[-1]
        or re.search(r"\.\d+\.", passage.down.path.removeprefix(_layer(passage)))
        or not any(
            _layer(other) == _layer(passage) and other.down.width > passage.down.width
            for other in found
        )
    ]


def _without_heads(model: nn.Module, found: list[Passage]) -> list[Passage]:
    """Without what stands in one module with the output embeddings."""
    if not isinstance(model, PreTrainedModel):
        return found
    last = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is last]
    return [
        passage
        for passage in found
        if not (holder := _holder(passage)) or not any(_contains(holder, path) for path in paths)
    ]


def _layer(passage: Passage) -> str:
    """The path as far as the first number."""
    match = re.match(r".*?\.\d+(?=\.)", passage.down.path)
    return match.group() if match else ""


def _cut_all(
    model: nn.Module, inputs: Inputs, found: list[Passage]
) -> tuple[dict[str, Cut], list[Pointwise]]:
    cuts: dict[str, Cut] = {}
    pointwise: list[Pointwise] = []
    for seed in range(TRIES):
        missing = [passage for passage in found if passage.down.path not in cuts]
        if missing:
            made, seen = cut(model, inputs, missing, 1000 * seed)
            cuts |= made
            pointwise += seen
    return cuts, pointwise


def _refusal(passage: Passage, made: Cut | None) -> str | None:
    """Why neither a row nor a mask is right; None: one is."""
    sources, neurons = passage.sources, passage.down.width
    names = [_below(_holder(passage), source.path) for source in sources]
    if len(sources) > 2:
        return f"it reads {len(sources)} linears: {', '.join(names)}"
    if len(sources) == 2 and not equal(sources[0].x, sources[1].x):
        return f"{' and '.join(names)} read different tensors"
    widths = [source.out.shape[-1] for source in sources]
    if widths not in ([neurons], [2 * neurons], [neurons, neurons]):
        return f"its {neurons} neurons are made of {widths} numbers"
    if made is None:
        return FEW
    if made.symmetric:
        return None
    if passage.coupled:
        return "its neurons are coupled, and not all alike: a norm over the neurons?"
    return "its neurons are not alike: each has a parameter between up and down"


def _holder(passage: Passage, act: str | None = None) -> str:
    """The smallest module that contains all parts."""
    paths = [call.path for call in (*passage.sources, passage.down)]
    parts = [path.split(".") for path in (paths if act is None else [*paths, act])]
    same = 0
    while all(len(each) > same + 1 and each[same] == parts[0][same] for each in parts):
        same += 1
    return ".".join(parts[0][:same])


def _is_own(passage: Passage, act: str, found: list[Passage]) -> bool:
    """Whether an activation may be of this FFN alone: in its holder, or in one without others."""
    holder = _holder(passage, act)
    others = (other.down.path for other in found if other is not passage)
    return holder == _holder(passage) or not any(_contains(holder, other) for other in others)


def _contains(holder: str, path: str) -> bool:
    return path.startswith(f"{holder}.") if holder else True


def _row(model: nn.Module, holder: str, passage: Passage, formula: Formula | None) -> Layout:
    """The row of a proven FFN: whole, in the layer, or masked."""
    masked = _masked(holder, passage)
    if formula is None:
        return masked
    layout = replace(
        masked,
        gate=None if formula.gate is None else _below(holder, formula.gate.path),
        up=_below(holder, formula.up.path),
        act=None if formula.act is None else _below(holder, formula.act),
        function=formula.function,
        slot="",
        masked=False,
    )
    module = model.get_submodule(holder)
    if is_whole(module, layout, formula.up.x):
        return replace(layout, casts_down=casts_down(module, layout, formula.up.x))
    if layout.gate is None and layout.act is not None:
        return replace(layout, slot=layout.up, bypass=(layout.act, layout.down))
    return masked


def _masked(holder: str, passage: Passage) -> Layout:
    """The row of an FFN whose hidden activations the host computes."""
    sources = list(passage.sources)
    if len(sources) == 2 and _is_linear_in(passage, sources[0]):
        sources.reverse()  # the gate first
    gated = len(sources) == 2 or passage.order != "apart"
    down = _below(holder, passage.down.path)
    return Layout(
        up=_below(holder, sources[-1].path),
        down=down,
        act=None,
        gate=_below(holder, sources[0].path) if gated else None,
        interleaved=passage.order == "interleaved",
        slot=down,
        masked=True,
    )


def _is_linear_in(passage: Passage, source: Call) -> bool:
    """Whether h is linear in a source, piece by piece: up rows are not bent, gate rows are."""
    h = passage.down.x
    (slope,) = torch.autograd.grad(h.sum(), source.out, retain_graph=True, create_graph=True)
    if not slope.requires_grad:
        return True
    (bend,) = torch.autograd.grad(slope.sum(), source.out, retain_graph=True, allow_unused=True)
    return bend is None or not bend.any()


def _below(holder: str, path: str) -> str:
    return path.removeprefix(f"{holder}.") if holder else path
