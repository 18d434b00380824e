"""Weights under DeepSpeed, which keeps fp32 masters of them and may shard both.

Works in every process at once, or in none: each function talks to the other processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

USED = "ACCELERATE_USE_DEEPSPEED"
"""Where Accelerate notes it, for every model to come."""


@contextmanager
def released() -> Iterator[None]:
    """Undoes at its end what DeepSpeed leaves behind.

    transformers and Accelerate remember it, and would shard what is loaded. ZeRO-3 replaces
    PyTorch's `linear` for good, by one that rounds otherwise.
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        os.environ.pop(USED, None)


@torch.no_grad()
def set_(param: nn.Parameter, value: Tensor) -> None:
    """Sets a parameter to `value`, in the fp32 master and in what the forward pass reads."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    value = value.to(param.device)
    if param.requires_grad:
        safe_set_full_fp32_param(param, value)
    with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
        param.copy_(value)


@torch.no_grad()
def add_(param: nn.Parameter, value: Tensor) -> None:
    """Adds `value` to a parameter, as `set_` sets it."""
    set_(param, _whole(param) + value)


@torch.no_grad()
def make_plain(model: nn.Module, engine: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Takes a model back from DeepSpeed: whole weights on the CPU, and no hook of its own.

    Args:
        model: trained by `engine`.
        engine: DeepSpeed's; it cannot be used any more.
        dtypes: of every parameter, by its name. fp32 routers beside bf16 weights get the masters'
            values, which are not rounded.
    """
    plain = {
        id(param): nn.Parameter(_whole(param).to("cpu", dtypes[name], copy=True), False)
        for name, param in model.named_parameters()
    }
    flags = {id(param): param.requires_grad for param in model.parameters()}
    engine.destroy()
    for module in model.modules():
        found = dict(module._parameters)  # DeepSpeed's own kind of dictionary goes, too
        module._parameters = {
            name: None if param is None else plain[id(param)] for name, param in found.items()
        }
        for param in (p for p in found.values() if p is not None):
            plain[id(param)].requires_grad_(flags[id(param)])
    model.to("cpu")


def not_finite(model: nn.Module) -> str | None:
    """Returns the name of a parameter whose share in this process is not finite, or None."""
    for name, param in model.named_parameters():
        local = getattr(param, "ds_tensor", param)
        if not torch.isfinite(local).all():
            return name
    return None


def _whole(param: nn.Parameter) -> Tensor:
    """Returns the fp32 master where there is one, else the weights, from all processes."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(param) if param.requires_grad else None
    if master is not None:
        return master.to(param.device)
    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()
