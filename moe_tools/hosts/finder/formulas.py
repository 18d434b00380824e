"""What an FFN computes, from numbers: random ones in place of its sources' outputs, and its h.

Letters: N tokens of one call, F neurons, W width of a source (F or 2F).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_tools.hosts.finder.cutting import Cut, Pointwise
from moe_tools.hosts.finder.tracing import Call, Passage

LEARNED = ("xielu",)
"""Names in ACT2FN of activations with parameters: no host calls one as a function."""
NO_ACTIVATION = "linear"
"""The name in ACT2FN of no activation at all: only a gated FFN can do without."""


@dataclass(frozen=True, eq=False)
class Formula:
    """h = act(up) or act(gate) * up."""

    gate: Call | None
    up: Call
    act: str | None
    """Path of the activation module in the model."""
    function: str | None


def formula_of(
    passage: Passage, made: Cut, pointwise: list[Pointwise], known: dict[str, nn.Module]
) -> Formula | None:
    """What h is, from numbers; None: nothing that we compute."""
    if passage.coupled:
        return None
    for gate, up, gate_NF, up_NF in _readings(passage, made):
        entry_NF = up_NF if gate_NF is None else gate_NF
        factor_NF = torch.ones_like(up_NF) if gate_NF is None else up_NF
        acts = [
            each.path
            for each in pointwise
            if equal(each.x, entry_NF) and agree(made.h_NF, each.out * factor_NF)
        ]
        if acts:  # the outermost: a module of the host may hold one of torch's
            return Formula(gate, up, min(acts, key=len), None)
        function = _closest(entry_NF, factor_NF, made.h_NF, known)
        if function is not None and (gate is not None or function != NO_ACTIVATION):
            return Formula(gate, up, None, function)
    return None


def _readings(passage: Passage, made: Cut) -> list[tuple[Call | None, Call, Tensor | None, Tensor]]:
    """(gate, up, gate_NF, up_NF) in each way that a row can say."""
    if len(passage.sources) == 2:
        (one, other), (one_NF, other_NF) = passage.sources, made.sources
        return [(one, other, one_NF, other_NF), (other, one, other_NF, one_NF)]
    (source,), (rows_NW,) = passage.sources, made.sources
    if passage.order == "apart":
        return [(None, source, None, rows_NW)]
    if passage.order == "concatenated":
        gate_NF, up_NF = rows_NW.chunk(2, dim=-1)
        return [(source, source, gate_NF, up_NF)]
    return [(source, source, rows_NW[:, ::2], rows_NW[:, 1::2])]


def functions() -> dict[str, nn.Module]:
    """The activations of transformers that have nothing to learn."""
    built = {name: ACT2FN[name] for name in ACT2FN if name not in LEARNED}
    return {name: act for name, act in built.items() if isinstance(act, nn.Module)}


def _closest(
    entry_NF: Tensor, factor_NF: Tensor, h_NF: Tensor, known: dict[str, nn.Module]
) -> str | None:
    """The activation that gives h: gelu has several forms that differ in the fourth digit only."""
    errors = {}
    for name, act in known.items():
        ours_NF = act(entry_NF) * factor_NF
        if agree(ours_NF, h_NF):
            errors[name] = float((ours_NF - h_NF).abs().max())
    return min(errors, key=lambda name: errors[name]) if errors else None


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are one up to rounding in fp32."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one to the bit."""
    return one.shape == other.shape and torch.equal(one, other)
