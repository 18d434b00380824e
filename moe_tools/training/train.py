"""Train: gradient steps on token blocks, towards a stated sparsity. Letters: B blocks, T tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_tools import processes
from moe_tools.checkpoint.loading import is_classifier
from moe_tools.data import Batch, Text, token_count
from moe_tools.experts.conversion import set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.moe_host import unfuse_experts
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.recipe import Train, check_step
from moe_tools.steps.calibrate import check_sparsity
from moe_tools.training import zero
from moe_tools.training.arguments import tensorboard_in
from moe_tools.training.checkpoints import check_layout, newest_checkpoint
from moe_tools.training.controller import ZEROS, followed, warn_if_missed
from moe_tools.training.launch import Launch
from moe_tools.training.lora import adapters, low_rank
from moe_tools.training.losses import DONOR_LOSSES, LOGIT_LOSSES, LOSSES, WATCHED
from moe_tools.training.trainer import RecipeTrainer
from moe_tools.training.trim import check_trimmable


def train(
    model: PreTrainedModel,
    step: Train,
    text: Text,
    work: Path,
    *,
    donor: PreTrainedModel | None = None,
    seed: int = 0,
    launch: Launch | None = None,
) -> dict[str, Any]:
    """Trains in place; checkpoints go to `work`, and the newest complete one is resumed.

    Args:
        model: dense or routed, in the dtype of its weights: bf16 weights get fp32 masters.
        step: what to train, how, and to which sparsity.
        text: of this step, in the order it is seen: blocks for a causal language model, labelled
            batches for a classifier.
        work: folder of the checkpoints.
        donor: the dense teacher, for the losses that need one.
        seed: of dropout and fresh adapters.
        launch: the device, DeepSpeed, reporters; default: PyTorch alone, where the model is.

    Returns:
        Last logged losses, the sparsity where routed, optimizer steps and trained tokens.

    Raises:
        ValueError: a loss that this model cannot have, no donor for one that needs it, too little
            text for the processes, a checkpoint that other processes wrote, or a full disk.
        FloatingPointError: the loss is NaN or infinite; the last good checkpoint is kept.
    """
    launch = launch or Launch(str(model.device))
    check_train(model, step, donor)
    check_sharded(model, launch)
    batches = whole_batches(text, step)
    checkpoint = newest_checkpoint(work)
    check_layout(checkpoint, launch)
    if WATCHED.keys() & step.losses.keys() or step.drive in ZEROS:
        unfuse_experts(model)  # before the optimizer holds what is taken apart to be watched
    if step.mode != "dense":
        set_mode(model, step.mode)
    steps = max(1, len(batches) // (step.accumulate * processes.count()))
    with low_rank(model, step, seed):
        trained = trainable_parts(model, step)
        with only_trainable(model, trained), tensorboard_in(launch.logs), zero.released():
            trainer = RecipeTrainer(model, step, batches, work, steps, trained, donor, seed, launch)
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.finish()
    if step.mode in ("soft", "straight"):
        set_mode(model, "hard")
    model.eval()
    measured = trainer.summary()
    if step.target_sparsity is not None:
        warn_if_missed(followed(measured, step.drive), step.target_sparsity, step.drive)
    return {**measured, "trained_tokens": token_count(batches)}


def whole_batches(text: Text, step: Train) -> list[Batch]:
    """The batches of whole optimizer steps of all processes; a resumed run would go on into a rest.

    Less text than one step has is one step, of one process.

    Raises:
        ValueError: less text than one step of several processes has.
    """
    if isinstance(text, Tensor):
        whole = len(text) // step.batch_size
        text = [Batch(ids_BT) for ids_BT in text.split(step.batch_size)]
    else:
        whole = len(text)
    needed = step.accumulate * processes.count()
    if whole < needed and processes.count() > 1:
        raise ValueError(
            f"the text has {whole} batches, but one optimizer step takes {needed}, "
            f"{step.accumulate} of each process: give more text or start fewer processes"
        )
    return list(text[: whole // needed * needed] if whole >= needed else text)


def trainable_parts(model: nn.Module, step: Train) -> list[dict[str, Any]]:
    """Optimizer groups: the host's weights and the routers, each with its learning rate."""
    routed = expert_ffns(model)
    routers = [p for ffn in routed for p in ffn.router.parameters()]
    if step.lora is not None:
        host = adapters(model)
    elif step.parts == "all":
        known = {id(p) for p in routers}
        host = [p for p in model.parameters() if id(p) not in known]
    elif step.parts == "ffn":
        host = _ffn_parameters(model)
    else:
        host = []
    groups = [{"params": host, "lr": step.lr}] if host else []
    if routers and step.mode in ("soft", "straight"):
        groups.append({"params": routers, "lr": step.router_lr})
    return groups


def _ffn_parameters(model: nn.Module) -> list[nn.Parameter]:
    routed = expert_ffns(model)
    if not routed:
        parts = [ffn.part(path) for ffn in find_ffns(model) for path in ffn.layout.parts()]
        return list({id(p): p for part in parts for p in part.parameters()}.values())
    routers = {id(p) for ffn in routed for p in ffn.router.parameters()}
    return [p for ffn in routed for p in ffn.parameters() if id(p) not in routers]


def check_train(model: PreTrainedModel, step: Train, donor: PreTrainedModel | None) -> None:
    """Whether a model can take a train step; changes nothing.

    Raises:
        ValueError: neither a causal language model nor a classifier, or a mode, loss or target
            that it cannot have.
    """
    check_step(step)
    name = type(model).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not is_classifier(model):
        raise ValueError(
            f"{name} is neither a causal language model nor a classifier: this version trains only "
            "those; `split`, `attach`, `fit` and `budget` work on every family"
        )
    routed = bool(expert_ffns(model))
    for name in step.losses:
        if name not in LOGIT_LOSSES:
            _ = LOSSES[name]
        if name in DONOR_LOSSES and donor is None:
            raise ValueError(f"loss {name} needs the donor, and none is given")
        if name in ("efficiency", "separability") and not routed:
            raise ValueError(f"loss {name} needs routers: put `attach` before this train step")
    if (step.mode != "dense") != routed:
        state = "routed" if routed else "dense"
        raise ValueError(f"train mode {step.mode} does not fit a {state} model")
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
    if step.parts == "routers" and step.mode not in ("soft", "straight"):
        raise ValueError(f"mode {step.mode} gives routers no gradient: parts cannot be `routers`")


def check_sharded(model: nn.Module, launch: Launch) -> None:
    """Whether a model can be trained where weights are sharded.

    Raises:
        ValueError: ZeRO-3, and a router that reads weights which are elsewhere when it scores.
    """
    if launch.zero_stage != 3:
        return
    for ffn in expert_ffns(model):
        if ffn.router.reads_rows:
            raise ValueError(
                f"{ffn.name}: its router reads the rows of the FFN, which ZeRO-3 shards: use zero2"
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


@contextmanager
def only_trainable(model: nn.Module, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Gradients only where something is trained; every flag is put back, by name."""
    wanted = {id(p) for group in groups for p in group["params"]}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for param in model.parameters():
        param.requires_grad_(id(param) in wanted)
    try:
        yield
    finally:
        for name, flag in flags.items():
            model.get_parameter(name).requires_grad_(flag)
