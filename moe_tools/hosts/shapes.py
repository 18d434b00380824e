"""The shapes that FFNs have in transformers: names and types of their parts, whatever the class.

A shape is tried on every module of a model. A class of its own row (`LAYOUTS`) comes first, where
names do not say it. Both are only guesses: `moe_tools.hosts.proof` compares every FFN with its host
before anything is changed.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from operator import attrgetter

import transformers
from torch import nn

from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.linears import widths

LAYOUTS: dict[str, Layout] = {
    "T5DenseActDense": Layout("wi", "wo", "act", hidden_dropout="dropout", casts_down=True),
    "T5DenseGatedActDense": Layout(
        "wi_1", "wo", "act", gate="wi_0", hidden_dropout="dropout", casts_down=True
    ),
}
"""Class of a host module that holds an FFN -> its layout, where no shape says it."""

SHAPES: tuple[Layout, ...] = (
    Layout("up_proj", "down_proj", gate="gate_proj", output_dropout="residual_dropout"),
    Layout("gate_up_proj", "down_proj"),
    Layout("up_proj", "down_proj"),
    Layout("fc1", "fc2", hidden_dropout="activation_dropout"),
    Layout("c_fc", "c_proj", output_dropout="dropout"),
    Layout("c_fc", "c_proj", output_dropout="residual_dropout"),
    Layout("dense_h_to_4h", "dense_4h_to_h"),
    Layout("fc_in", "fc_out", output_dropout="dropout"),
    Layout("lin1", "lin2", output_dropout="dropout"),
    Layout("linear_1", "linear_2", hidden_dropout="activation_dropout"),
    Layout("wi_1", "wo", gate="wi_0", hidden_dropout="dropout"),
    Layout("wi", "wo", hidden_dropout="dropout"),
    Layout("Wi", "Wo", hidden_dropout="drop"),
    Layout("w3", "w2", gate="w1"),
    Layout("input_linear", "output_linear"),
    Layout("layer_1", "layer_2"),
    Layout("ffn", "ffn_output"),
    Layout("intermediate", "output", hidden_dropout="activation_dropout", output_dropout="dropout"),
    Layout(
        "intermediate.dense",
        "output.dense",
        "intermediate.intermediate_act_fn",
        slot="intermediate",
        bypass=("output.dense",),
    ),
)
"""Tried in this order. An activation is called by one of `ACTS`, a dropout may be missing, and
widths tell whether `up` holds gate rows as well."""

ACTS = ("act_fn", "act", "activation_fn", "activation", "activation_function", "relu")

NO_FFN = ("Norm", "Router", "Adapter", "Projector")
"""Modules of a class with such a name hold linears and activations, but no FFN."""

FORMAT_1 = (
    *("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP"),
    *("Qwen2MoeMLP", "Qwen3MoeMLP", "Phi3MLP", "GPT2MLP", "GPTNeoXMLP", "OPTDecoderLayer"),
    *("BertLayer", "RobertaLayer", "T5DenseActDense", "T5DenseGatedActDense"),
)
"""Classes that moe-tools knew when its folders did not say which FFNs they convert."""


def fit(holder: nn.Module) -> Layout | None:
    """The layout of the FFN that a module holds; None: it holds none of a known shape.

    Raises:
        ValueError: a class with a row of its own lacks a part that the row names.
    """
    own = LAYOUTS.get(type(holder).__name__)
    if own is not None:
        _check_parts(holder, own)
        return own
    return next((found for shape in SHAPES if (found := _fitted(holder, shape)) is not None), None)


def part_of(holder: nn.Module, path: str) -> nn.Module:
    """A part of a holder; for a probability, the dropout that it means.

    Raises:
        AttributeError: the holder has neither.
    """
    found = attrgetter(path)(holder)
    if isinstance(found, float | int):
        return nn.Dropout(float(found)).train(holder.training)
    if not isinstance(found, nn.Module):
        raise AttributeError(f"{path} of {type(holder).__name__} is no module")
    return found


def _fitted(holder: nn.Module, shape: Layout) -> Layout | None:
    acts = ACTS if shape.act is None else (shape.act,)
    act = next((name for name in acts if not _missing(holder, name)), None)
    if act is None or any(_missing(holder, path) for path in (shape.gate, shape.up, shape.down)):
        return None
    hidden, output = (
        None if path is None or _missing(holder, path) else path
        for path in (shape.hidden_dropout, shape.output_dropout)
    )
    found = replace(shape, act=act, hidden_dropout=hidden, output_dropout=output)
    rows = _rows(holder, found)
    if rows == 2:
        found = replace(found, gate=found.up)
    return _placed(holder, found) if rows else None


def _rows(holder: nn.Module, layout: Layout) -> int:
    """How many rows `up` has for each neuron, two where it holds the gate's; 0: no FFN.

    Gate and up lead from D numbers to F, and down from F to D.
    """
    up, down = widths(part_of(holder, layout.up)), widths(part_of(holder, layout.down))
    gate = up if layout.gate is None else widths(part_of(holder, layout.gate))
    if up is None or down is None or gate != up or up[0] != down[1]:
        return 0
    fused = layout.gate is None and up[1] == 2 * down[0]
    return 2 if fused else int(up[1] == down[0])


def _placed(holder: nn.Module, layout: Layout) -> Layout:
    """The layout, with what is to be replaced."""
    if layout.slot or _is_whole(holder, layout):
        return layout
    if layout.gate not in (None, layout.up):  # two linears that no module holds together
        return layout.as_masked()
    outside = (layout.act, layout.hidden_dropout, layout.down)
    bypass = tuple(path for path in outside if path is not None)
    return replace(layout, output_dropout=None, slot=layout.up, bypass=bypass)


def _missing(holder: nn.Module, path: str | None) -> bool:
    if path is None:
        return False
    try:
        part_of(holder, path)
    except AttributeError:
        return True
    return False


def _is_whole(holder: nn.Module, layout: Layout) -> bool:
    """Whether a holder has nothing but the parts of its FFN, and takes x alone."""
    tops = {path.partition(".")[0] for path in layout.parts()}
    others = [
        child
        for name, child in holder.named_children()
        if name not in tops and not isinstance(child, nn.Dropout | nn.Identity)
    ]
    parameters = list(inspect.signature(type(holder).forward).parameters.values())[1:]
    needed = [each for each in parameters if each.default is inspect.Parameter.empty]
    plain = [each for each in needed if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return not others and len(needed) == len(plain) == 1


def _check_parts(holder: nn.Module, layout: Layout) -> None:
    name = type(holder).__name__
    lacking = [path for path in layout.parts() if _missing(holder, path)]
    if lacking:
        raise ValueError(
            f"{name} of transformers {transformers.__version__} has no {' and no '.join(lacking)}: "
            "it was renamed since the versions that moe-tools knows; install one of these"
        )
