"""Whether a model can take a train step; nothing here changes the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import is_classifier, regresses
from moe_tools.data.batching import Batches, Text
from moe_tools.data.limits import continues_text, says_targets
from moe_tools.experts.conversion import check_unselected, divided, read_block
from moe_tools.experts.experts import LEARNING, expert_ffns
from moe_tools.experts.line import check_thresholds
from moe_tools.hosts.dequantise import is_quantised
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.linears import WAY_OUT
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.steps.calibrate import check_sparsity
from moe_tools.training.controller import ZEROS
from moe_tools.training.losses import LOSSES
from moe_tools.training.sharpen import check_sharpens

if TYPE_CHECKING:
    from moe_tools.training.teacher import Donor
    from moe_tools.training.train import Train


def check_train(model: PreTrainedModel, step: Train, donor: PreTrainedModel | Donor | None) -> None:
    """Whether a model can take a train step; changes nothing.

    Raises:
        ValueError: no causal language model, classifier or encoder-decoder, quantised weights, or a
            mode, loss or target that it cannot have.
    """
    step.check()
    name = type(model).__name__
    if not continues_text(model) and not is_classifier(model) and not says_targets(model):
        raise ValueError(
            f"{name} is neither a causal language model nor a classifier, nor an encoder-decoder "
            "that makes its decoder's input from labels: this version trains only those; `split`, "
            "`attach`, `fit` and `budget` work on every family"
        )
    check_unselected(model)
    _check_unstored(model, step)
    routed = bool(expert_ffns(model))
    for name in step.losses:
        loss = LOSSES[name]
        if loss.needs_donor and donor is None:
            raise ValueError(f"loss {name} needs the donor, and none is given")
        if loss.needs_experts:
            divided(model)
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
        check_thresholds(model)
        check_sparsity(expert_ffns(model), step.target_sparsity)
    if step.beta is not None:
        check_sharpens(model)
    if step.parts != "routers":
        _check_plain(model)
    if step.parts == "routers" and step.mode not in LEARNING:
        raise ValueError(f"mode {step.mode} gives routers no gradient: parts cannot be `routers`")


def check_learnable(model: PreTrainedModel, text: Text) -> None:
    """Whether a text says what this kind of model has to learn.

    Raises:
        ValueError: targets for what has no decoder beside an encoder, or none for what has one;
            classes for what gives scores, or scores for what tells classes apart.
    """
    batch = None if isinstance(text, Tensor | Batches) or not len(text) else text[0]
    name, targets = type(model).__name__, batch is not None and batch.targets_BS is not None
    if targets and not says_targets(model):
        raise ValueError(
            f"{name} is no encoder-decoder, and has no use for targets: train it on text (task: lm)"
        )
    if says_targets(model) and not targets:
        raise ValueError(
            f"{name} is an encoder-decoder, and learns what to say about a text: use task: seq2seq "
            "and data of two columns, a source and its target"
        )
    labels_B = None if batch is None else batch.labels_B
    if is_classifier(model) and labels_B is not None:
        scores = labels_B.is_floating_point()
        if scores != regresses(model):
            wanted = "scores (task: regress)" if not scores else "classes (task: classify)"
            raise ValueError(f"{name} was made to give other labels than these: it needs {wanted}")


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
