"""Whether a model can take a train step; nothing here changes the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import is_classifier
from moe_tools.data.limits import continues_text
from moe_tools.experts.conversion import check_unselected, read_block
from moe_tools.experts.experts import LEARNING, expert_ffns
from moe_tools.hosts.dequantise import is_quantised
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.linears import WAY_OUT
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.steps.calibrate import check_sparsity
from moe_tools.training.controller import ZEROS
from moe_tools.training.losses import LOSSES
from moe_tools.training.trim import check_trimmable

if TYPE_CHECKING:
    from moe_tools.training.teacher import Donor
    from moe_tools.training.train import Train


def check_train(model: PreTrainedModel, step: Train, donor: PreTrainedModel | Donor | None) -> None:
    """Whether a model can take a train step; changes nothing.

    Raises:
        ValueError: neither a causal language model nor a classifier, quantised weights, or a mode,
            loss or target that it cannot have.
    """
    step.check()
    name = type(model).__name__
    if not continues_text(model) and not is_classifier(model):
        raise ValueError(
            f"{name} is neither a causal language model nor a classifier: this version trains only "
            "those; `split`, `attach`, `fit` and `budget` work on every family"
        )
    check_unselected(model)
    _check_unstored(model, step)
    routed = bool(expert_ffns(model))
    for name in step.losses:
        loss = LOSSES[name]
        if loss.needs_donor and donor is None:
            raise ValueError(f"loss {name} needs the donor, and none is given")
        if loss.needs_routers and not routed:
            raise ValueError(f"loss {name} needs routers: put `attach` before this train step")
    if (step.mode != "dense") != routed:
        state = "routed" if routed else "dense"
        raise ValueError(f"train mode {step.mode} does not fit a {state} model")
    if step.mode != "dense":
        for ffn in expert_ffns(model):
            ffn.check_mode(step.mode)
    if step.drive in ZEROS:
        check_zeros(model, step.drive)
    elif step.target_sparsity is not None:
        if not routed:
            raise ValueError(
                "target_sparsity needs routers: put `attach` before this train step, or drive the "
                "zeros of a dense ReLU model (drive: l1)"
            )
        check_trimmable(model)
        check_sparsity(expert_ffns(model), step.target_sparsity)
    if step.parts != "routers":
        _check_plain(model)
    if step.parts == "routers" and step.mode not in LEARNING:
        raise ValueError(f"mode {step.mode} gives routers no gradient: parts cannot be `routers`")


def _check_unstored(model: PreTrainedModel, step: Train) -> None:
    """Whether a step leaves weights where they are that lie on a grid of few bits."""
    block = read_block(model.config)
    if block is not None and block.weight_bits is not None and step.parts != "routers":
        raise ValueError(
            f"train would move weights that `quantize` stored in {block.weight_bits} bits: put "
            "`train` before it, or train routers alone (parts: routers)"
        )


def _check_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if is_quantised(module):
            raise ValueError(
                f"{path} is quantised ({type(module).__name__}), and its codes cannot be trained: "
                f"train adapters on it by PEFT, or {WAY_OUT}"
            )


def check_zeros(model: nn.Module, drive: str) -> None:
    """Whether the exact zeros of a model can be driven.

    Raises:
        ValueError: a routed model, or an activation that is never exactly 0.
    """
    if expert_ffns(model):
        raise ValueError(f"drive {drive} counts the zeros of a dense model: put it before `attach`")
    for ffn in find_ffns(model):
        if not gives_zeros(ffn.act):
            raise ValueError(
                f"drive {drive} counts exact zeros, but {type(ffn.act).__name__} of {ffn.name} has "
                "none: put `swap: {activation: {kind: relu}}` before this train step"
            )
