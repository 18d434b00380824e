"""How the table of families names layouts and experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from torch import nn
from transformers.integrations import moe

from moe_tools.hosts.ffn import FFN

PLAIN_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


def layouts_of(ffns: Iterable[FFN]) -> str:
    """The layouts of a model's dense FFNs and views of experts, each once."""
    return "; ".join(sorted({_layout(ffn) for ffn in ffns}))


def _layout(ffn: FFN) -> str:
    row = asdict(ffn.layout)
    words = ["gated" if row["gate"] else "plain"]
    if row["gate"] == row["up"]:
        words.append("one linear")
    if row.get("interleaved"):
        words.append("interleaved")
    if row.get("masked"):
        words.append("masked")
    elif row["slot"]:
        words.append("in the layer")
    if row.get("function"):
        words.append("functional activation")
    return ", ".join(words)


def experts_of(model: nn.Module) -> str:
    """How a model keeps its experts, each kind once; empty: it has none."""
    kinds = {_experts(module) for module in model.modules() if _has_stacks(module)}
    return "; ".join(sorted(kinds))


def _has_stacks(module: nn.Module) -> bool:
    """Whether a module holds matrices of several experts in one tensor, of three dimensions."""
    named = "expert" in type(module).__name__.lower() or hasattr(module, "is_transposed")
    direct = module.parameters(recurse=False)
    return named and any(parameter.dim() == 3 for parameter in direct)


def _experts(module: nn.Module) -> str:
    if not hasattr(module, "is_transposed"):
        return "without flags"
    words = ["gated" if module.has_gate else "plain"]
    for flag, word in (("is_transposed", "transposed"), ("has_bias", "biases")):
        if getattr(module, flag):
            words.append(word)
    if module.has_gate and not module.is_concatenated:
        words.append("interleaved")
    if type(module)._apply_gate is not moe._default_apply_gate:  # type: ignore[attr-defined]
        words.append("own gate")
    return ", ".join(words)
