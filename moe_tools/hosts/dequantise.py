"""Makes a quantised model a plain one: every linear becomes the matrix that it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tools.hosts.ffn import grafted_ffns
from moe_tools.hosts.linears import as_linear, has_numbers, is_numbers, widths


def dequantise(model: Any, dtype: torch.dtype) -> None:
    """Replaces every quantised linear of a model by a plain one, in place.

    Args:
        model: of any quantiser, or plain already: then nothing changes.
        dtype: of the plain weights.

    Raises:
        ValueError: a linear whose matrix cannot be found, or weights of another kind that are
            quantised (embeddings, fused experts).
    """
    for path, linear in list(model.named_modules()):
        if is_quantised(linear):
            _exchange(model, path, linear, as_linear(linear, dtype))
    for name, parameter in model.named_parameters():
        if not is_numbers(parameter):
            raise ValueError(
                f"{name} is quantised ({type(parameter).__name__}, {parameter.dtype}), and no "
                "linear: only its quantiser knows its numbers"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear that keeps codes in place of numbers."""
    leaf = next(module.children(), None) is None
    return leaf and widths(module) is not None and not has_numbers(module)


def _exchange(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, also where an FFN of ours listens to it."""
    model.set_submodule(path, new)
    new._forward_pre_hooks.update(old._forward_pre_hooks)
    for ffn in grafted_ffns(model):
        ffn.exchange(old, new)
