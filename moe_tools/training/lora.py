"""Low-rank adapters (LoRA, arXiv 2106.09685), by PEFT, on the host's linears; merged at the end.

Merged and not kept beside the weights: the steps that follow, the stock class, quantisers and
`moe-tools export` all read the plain weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.hosts.input_threshold import move_threshold
from moe_tools.hosts.linears import base_of

if TYPE_CHECKING:
    from moe_tools.training.train import Train

MARK = "lora_"
"""What PEFT's parameters are called."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the host's linears (arXiv 2106.09685): W + alpha / rank * B A."""

    rank: int = 16
    alpha: int = 32


@contextmanager
def low_rank(model: PreTrainedModel, step: Train, seed: int) -> Iterator[None]:
    """While it lasts, the linears of `step.parts` have adapters; then they are merged.

    Fresh adapters change nothing; `seed` draws them. After an error they are dropped: the weights
    are those from before.

    Raises:
        ValueError: PEFT is not installed.
    """
    if step.lora is None:
        yield
        return
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ValueError("train: lora needs PEFT: pip install 'moe-tools[peft]'") from error
    config = LoraConfig(
        r=step.lora.rank,
        lora_alpha=step.lora.alpha,
        target_modules=adapted(model, step.parts),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(model, {"default": config}, "default")
    try:
        with _adapters_see_the_same(model):
            yield
    except BaseException:
        tuner.unload()
        raise
    else:
        tuner.merge_and_unload()
    finally:  # PEFT froze the host
        for name, flag in flags.items():
            model.get_parameter(name).requires_grad_(flag)


@contextmanager
def _adapters_see_the_same(model: nn.Module) -> Iterator[None]:
    """While it lasts, an adapter is given what the thresholds on its linear's inputs leave.

    Merged, it multiplies that.
    """
    wrapped = [module for module in model.modules() if base_of(module) is not module]
    for module in wrapped:
        move_threshold(base_of(module), module)
    try:
        yield
    finally:
        for module in wrapped:
            move_threshold(module, base_of(module))


def adapters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' weights."""
    return [param for name, param in model.named_parameters() if MARK in name]


def planned_adapters(model: PreTrainedModel, step: Train) -> list[nn.Parameter]:
    """What `low_rank` would add to a model: tensors of their sizes, without numbers."""
    if step.lora is None:
        return []
    weights = [model.get_parameter(f"{path}.weight") for path in adapted(model, step.parts)]
    return [
        nn.Parameter(torch.empty(step.lora.rank, side, dtype=weight.dtype, device="meta"))
        for weight in weights
        for side in weight.shape
    ]


def adapted(model: PreTrainedModel, parts: str) -> list[str]:
    """Paths of the linears that get an adapter: of the FFNs, or all but routers and head."""
    routed = expert_ffns(model)
    left_out = {id(module) for ffn in routed for module in ffn.router.modules()}
    left_out.add(id(model.get_output_embeddings()))
    ffns = [ffn.projections for ffn in routed or unfused_ffns(model)]
    of_ffns = {id(linear) for ffn in ffns for linear in ffn.linears()}
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) not in left_out
        and (parts in ("all", "layers") or id(module) in of_ffns)
    ]
