"""Weights under DeepSpeed, which keeps fp32 masters of them and may shard both.

Works in every process at once, or in none: each function talks to the other processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_tools import processes
from moe_tools.experts.experts import expert_ffns

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


def gather_for_routers(model: nn.Module) -> None:
    """Lets ZeRO-3 gather the rows of an FFN for routers that read them, as it does for a linear.

    In the forward and the backward pass; called before DeepSpeed takes the model.
    """
    import deepspeed

    for ffn in expert_ffns(model):
        if ffn.router.reads_rows:
            for linear in ffn.projections.linears():
                for param in linear.parameters():
                    deepspeed.zero.register_external_parameter(ffn.router, param)


class Share(NamedTuple):
    """What one process has of the numbers of a weight that is in shards: equally many in each."""

    mine: Tensor


@torch.no_grad()
def take_finer(model: nn.Module) -> dict[str, Tensor | Share]:
    """Copies the fp32 weights beside bf16 ones, by name, before DeepSpeed rounds them to bf16.

    It leaves weights that were born in shards as they are, and then fails on two dtypes: in such a
    model they are rounded here.
    """
    fp32 = {name: p for name, p in model.named_parameters() if p.dtype == torch.float32}
    finer = {name: _copy(param) for name, param in fp32.items()}
    if any(is_share(param) for param in model.parameters()):
        for param in fp32.values():
            if is_share(param):
                shard: Any = param.ds_tensor  # type: ignore[attr-defined]
                shard.data = shard.data.bfloat16()
            param.data = param.data.bfloat16()
    return finer


def is_share(param: nn.Parameter) -> bool:
    """Whether ZeRO-3 has the numbers of a parameter."""
    return getattr(param, "ds_id", None) is not None


def joined(param: nn.Parameter) -> Tensor:
    """A parameter's numbers, of all shards where it is in shards; in all processes at once."""
    return from_shares(_copy(param), param)


def _copy(param: nn.Parameter) -> Tensor | Share:
    if is_share(param):
        return Share(param.ds_tensor.detach().clone())  # type: ignore[attr-defined]
    return param.detach().clone()


def from_shares(value: Tensor | Share, param: nn.Parameter) -> Tensor:
    """Joins the shares of all processes, if they are any, in the shape of `param`."""
    if not isinstance(value, Share):
        return value
    shape: torch.Size = param.ds_shape  # type: ignore[attr-defined]
    whole = processes.gather_rows(value.mine[None]).flatten()
    return whole[: shape.numel()].view(shape)


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


def complete_resume(adamw: torch.optim.Optimizer, scheduler: Any) -> None:
    """Puts right what DeepSpeed restores from a universal checkpoint under ZeRO-3.

    It gives every group the learning rate of the first, and all of them one count of steps
    between them, which each then counts up. After any other resume this changes nothing.

    Args:
        adamw: the optimizer below DeepSpeed's.
        scheduler: of the learning rates, restored.
    """
    for group, rate in zip(adamw.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for state in adamw.state.values():
        if "step" in state:  # a process may have no share of a group
            state["step"] = state["step"].clone()


@torch.no_grad()
def add_(param: nn.Parameter, value: Tensor) -> None:
    """Adds `value` to a parameter, as `set_` sets it."""
    set_(param, _whole(param) + value)


@torch.no_grad()
def make_plain(
    model: nn.Module, engine: Any, dtypes: dict[str, torch.dtype], *, everywhere: bool = True
) -> None:
    """Takes a model back from DeepSpeed: whole weights on the CPU, and no hook of its own.

    Args:
        model: trained by `engine`.
        engine: DeepSpeed's; it cannot be used any more.
        dtypes: of every parameter, by its name. fp32 routers beside bf16 weights get the masters'
            values, which are not rounded.
        everywhere: False: the first process alone gets the weights, one by one, and the others
            have empty ones then, on the meta device.
    """
    home = "cpu" if everywhere or processes.rank() == 0 else "meta"
    if any(map(is_share, model.parameters())):
        engine.empty_partition_cache()  # what stayed gathered after the last pass
    plain = {}
    for name, param in model.named_parameters():
        plain[id(param)] = nn.Parameter(_whole(param, home, dtypes[name]), False)
        if is_share(param):  # while the whole weights come, the shares go
            shard: Any = param.ds_tensor  # type: ignore[attr-defined]
            shard.data = shard.data.new_empty(0)
    flags = {id(param): param.requires_grad for param in model.parameters()}
    engine.destroy()
    for module in model.modules():
        found = dict(module._parameters)  # DeepSpeed's own kind of dictionary goes, too
        module._parameters = {
            name: None if param is None else plain[id(param)] for name, param in found.items()
        }
        for param in (p for p in found.values() if p is not None):
            plain[id(param)].requires_grad_(flags[id(param)])
        vars(module).pop("_external_params", None)  # they are gone
    model.to(home)


def not_finite(model: nn.Module) -> str | None:
    """Returns the name of a parameter whose share in this process is not finite, or None."""
    for name, param in model.named_parameters():
        local = getattr(param, "ds_tensor", param)
        if not torch.isfinite(local).all():
            return name
    return None


def _whole(
    param: nn.Parameter, home: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns a copy of the fp32 master where there is one, else of the weights, of all processes.

    Args:
        param: of which every process may have a share.
        home: where the copy is; None: where the weights are.
        dtype: of the copy; None: of what is copied.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(param) if param.requires_grad else None
    if master is not None:
        return master.to(home or param.device, dtype or master.dtype, copy=True)
    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().to(home or param.device, dtype or param.dtype, copy=True)
