"""Train: gradient steps on token blocks, towards a stated sparsity. Letters: B blocks, T tokens."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from transformers import PreTrainedModel

from moe_tools import processes
from moe_tools.data import Text, fingerprint, token_count
from moe_tools.experts.conversion import set_mode
from moe_tools.experts.line import check_movable
from moe_tools.freed_memory import keep_freed_memory
from moe_tools.hosts.moe_host import unfuse_experts
from moe_tools.measure.activations import Activations, logits_bytes
from moe_tools.measure.flops import forward_flops
from moe_tools.measure.memory import ModelStates, Teacher, largest_layer
from moe_tools.steps.launch import Launch
from moe_tools.steps.rules import at_least, from_0_to_1, require, strictly_between_0_and_1
from moe_tools.steps.schedules import (
    Fall,
    Warmup,
    Weight,
    check_stages,
    check_warmup,
    is_ever_on,
)
from moe_tools.steps.step import Cost, Option, Setting, Step, Work
from moe_tools.training import born_sharded, zero
from moe_tools.training.arguments import tensorboard_in
from moe_tools.training.attention import attention
from moe_tools.training.batches import in_batches, whole_batches
from moe_tools.training.cached_teacher import bytes_each
from moe_tools.training.checkpoints import check_layout, check_text, newest_checkpoint
from moe_tools.training.checks import check_learnable, check_train
from moe_tools.training.compiled import check_compiles, compiled
from moe_tools.training.controller import DRIVEN, LOOKS, ZEROS, Drive, warn_if_missed
from moe_tools.training.held_out import HeldOut
from moe_tools.training.learning_rate import in_numbers
from moe_tools.training.lora import Lora, low_rank, planned_adapters
from moe_tools.training.losses import needs_donor, needs_experts, seen_kinds
from moe_tools.training.parts import only_trainable, trainable_parts
from moe_tools.training.reshape import reshaped
from moe_tools.training.sharpen import write_betas
from moe_tools.training.teacher import Donor, taught
from moe_tools.training.throughput import peak_of, step_flops
from moe_tools.training.trainer import RecipeTrainer

logger = logging.getLogger(__name__)

MOST_EPOCHS = 10_000
"""More is a mistake, and would be too many rows to count."""


@dataclass(frozen=True)
class Train(Step):
    """Gradient steps on token blocks."""

    verb = "train"
    trains = True
    whole_model = "its gradients go through all layers at once"
    one_of = ("tokens", "epochs")

    tokens: int = 0
    """Training tokens of this step; every step goes on where the last one stopped. 0: the step is
    left out, unless it has `epochs` or the command line says `--tokens`."""
    epochs: float = 0.0
    """How often it reads the whole text, in place of `tokens`: each time in another order."""
    mode: Literal["dense", "soft", "straight", "weighted", "hard"] = "dense"
    """How scores switch experts; see `moe_tools.experts.experts.Mode`. After soft and straight the
    model is in mode hard."""
    losses: dict[str, Weight] = field(default_factory=lambda: {"lm": 1.0})
    """Name of a loss -> its weight, a number or stages. What `drive` turns starts from there."""
    target_sparsity: float | None = None
    """Share of neurons off, over tokens and FFNs, that this step has to reach; under the drives
    l1 and hoyer, of a dense model, the share that is exactly 0."""
    drive: Drive = "shift"
    """What brings the sparsity there; see `moe_tools.training.controller`."""
    ramp: float = 0.6
    """Share of the steps in which the target is reached, in every mode; 0: at once."""
    vary: float = 0.0
    """Every optimizer step draws its own sparsity, at most so far from the target, and as much more
    or less of the inputs that thresholds drop: one folder then serves the range (`evaluate DIR
    --operate 0.3 0.5 0.7`)."""
    beta: float | None = None
    """To where the beta of `swish_beta` rises, in the share `ramp` of the steps: SiLU on its way to
    ReLU; see `moe_tools.training.sharpen`."""
    parts: Literal["all", "layers", "ffn", "routers"] = "all"
    """What is trained: all; all but token embeddings and head, which have nothing to learn where a
    student says what its donor said; the FFNs; routers alone. The routers are in each of these,
    except in hard mode."""
    lora: Lora | None = None
    """Trains adapters of the linears among `parts` in place of their weights, and routers as ever;
    at the end they are merged: the folder stays a plain one."""
    lr: float = 1e-4
    """Peak learning rate of the host's weights, or of their adapters."""
    lr_unit: Literal["absolute", "weights"] = "absolute"
    """weights: `lr` is a share of the size of the weights, and what suits one model suits another;
    see `moe_tools.training.learning_rate`. `router_lr` is absolute."""
    router_lr: float = 1e-3
    """Peak learning rate of the routers. In mode weighted a hundredth of it fits logits of spread
    0.02, with which softmax routers start."""
    batch_size: int = 4
    """Blocks of one forward pass on one device."""
    accumulate: int = 1
    """Forward passes of one optimizer step."""
    checkpointing: bool = False
    """Computes each layer again in the backward pass: less memory, a forward pass more."""
    warmup: Warmup = 0.06
    """Share of the optimizer steps, below 1; a whole number is so many of them: `warmup: 1000`."""
    schedule: Fall = "cosine"
    """How the learning rates fall after the warm-up: along half a cosine, a line, or not at all."""
    floor: float = 0.1
    """Where cosine and linear end, as a share of the peak; under `constant` it has no say."""
    checkpoint_every: int = 100
    """Optimizer steps, not micro-batches."""
    evaluate_every: int = 0
    """Optimizer steps from one look at held-out text to the next, the last one included; 0: none.
    Of mode soft and straight it is mode hard that is measured, as the step leaves the model."""
    evaluate_tokens: int = 32768
    """Held-out tokens of each look, all processes together."""

    teacher: Teacher = "whole"
    """Where the donor is, for a loss that needs it; see `moe_tools.training.teacher`. `distill_ffn`
    needs more of it than what is cached."""
    teacher_top_k: int = 64
    """Tokens of each position whose probabilities a cached teacher keeps: 6 bytes each."""

    def check(self) -> None:
        """Ranges of every number; a drive has its target and its loss for itself."""
        at_least(1, self, "batch_size", "accumulate", "checkpoint_every", "evaluate_tokens")
        at_least(1, self, "teacher_top_k")
        at_least(0, self, "tokens", "epochs", "lr", "router_lr", "evaluate_every")
        require(self.epochs <= MOST_EPOCHS, self, "epochs", self.epochs, f"at most {MOST_EPOCHS:,}")
        if self.tokens and self.epochs:
            raise ValueError(
                f"train: it has {self.tokens:,} tokens and {self.epochs:g} epochs, and the two may "
                "differ: give one of them"
            )
        from_0_to_1(self, "ramp", "floor")
        check_warmup(self, self.warmup)
        strictly_between_0_and_1(self, "target_sparsity")
        self._check_drive()
        if self.lora is not None:
            for key, value in asdict(self.lora).items():
                require(value >= 1, self, f"lora.{key}", value, "at least 1")
            require(
                self.parts != "routers", self, "lora with parts", self.parts, "all, layers or ffn"
            )
            rule = "absolute: adapters begin at 0"
            require(self.lr_unit == "absolute", self, "lr_unit with lora", self.lr_unit, rule)
        for name, weight in self.losses.items():
            if isinstance(weight, tuple):
                check_stages(self, f"losses.{name}", weight)

        self._check_teacher()

    def _check_teacher(self) -> None:
        if self.teacher == "whole":
            return
        if not self.needs_donor():
            raise ValueError(
                f"train: teacher {self.teacher} needs a loss that has a teacher (distill, "
                "distill_ffn): give one, or leave `teacher` out"
            )
        if self.teacher == "cached" and "distill_ffn" in self.losses:
            raise ValueError(
                "train: teacher cached keeps probabilities, and distill_ffn compares the outputs "
                "of FFNs: use distill alone, or teacher sharded or offloaded"
            )

    def _check_drive(self) -> None:
        require(self.beta is None or self.beta > 0, self, "beta", self.beta, "above 0")
        require(0 <= self.vary < 0.5, self, "vary", self.vary, "in [0, 0.5)")
        if self.vary and (self.target_sparsity is None or self.drive != "shift"):
            raise ValueError("train: vary needs a target_sparsity to vary, and drive shift")
        if self.drive == "shift":
            return
        if self.target_sparsity is None:
            raise ValueError(f"train: drive {self.drive} needs a target_sparsity to drive to")
        loss = DRIVEN[self.drive].loss
        if isinstance(self.losses.get(loss), tuple):
            raise ValueError(
                f"train: drive {self.drive} sets the weight of {loss}: give it no stages"
            )

    @property
    def amount(self) -> float:
        """Tokens or epochs, whichever it has: what its part of all training is measured by."""
        return self.tokens or self.epochs

    def changed(self, option: Option, value: Any) -> Self:
        """The step under an option; tokens and epochs take each other's place."""
        if option == "tokens":
            return replace(self, tokens=value, epochs=0.0)
        if option == "epochs":
            return replace(self, epochs=value, tokens=0)
        return super().changed(option, value)

    def takes(self, option: Option) -> bool:
        """Tokens, and the sparsity of a step that has one."""
        return option in ("tokens", "epochs") or (
            option == "target_sparsity" and self.target_sparsity is not None
        )

    def control(self) -> Self | None:
        """The language loss alone, on the same parts of a dense model; never routers alone.

        A step without a language loss has none: of what the donor says the donor has nothing to
        learn.
        """
        learns_text = is_ever_on(self.losses.get("lm", 0.0))
        if self.parts == "routers" or not self.amount or not learns_text:
            return None
        dense = Train()
        kept = {name: getattr(dense, name) for name in OF_ROUTERS + OF_TEACHERS}
        return replace(self, **kept)

    def needs_donor(self) -> bool:
        """Whether a loss compares with the model from before."""
        return needs_donor(self.losses)

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Checks that the model can take the step."""
        check_train(model, self, donor=model)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Trains; returns what `train` measured, and a fingerprint of the text."""
        text = work.training()
        donor = Donor(work.teacher, work.teacher_source()) if self.needs_donor() else None
        measured = train(
            model,
            self,
            text,
            work.folder,
            donor=donor,
            seed=work.seed,
            launch=work.launch,
            held_out=work.held_out(self.evaluate_tokens) if self.evaluate_every else None,
            weights=work.weights,
        )
        return {**measured, "data": fingerprint(text)}

    def cost(self, model: PreTrainedModel, setting: Setting) -> Cost:
        """Steps, FLOPs and memory; a text to classify counts as a whole block, however short."""
        trained = [one for group in trainable_parts(model, self) for one in group["params"]]
        added = planned_adapters(model, self)
        trained += added
        taught = self.needs_donor()
        passes = 3 + taught + self.checkpointing  # a teacher's, or recomputing: a pass more
        length = setting.block_length
        blocks = self.tokens // length
        together = self.batch_size * self.accumulate * setting.processes
        cached = taught and self.teacher == "cached"
        teacher = setting.teacher_bytes if taught and not cached else 0
        summed, layer = self.accumulate > 1, largest_layer(model)
        kept, watched = Activations.of(model, length, self.mode), seen_kinds(self.losses)
        seen = self.batch_size * length
        each, again = (
            round(seen * kept.per_token(recomputed=recomputed, watched=watched))
            for recomputed in (self.checkpointing, True)
        )
        return Cost(
            optimizer_steps=max(1, blocks // together),
            trained=sum(one.numel() for one in trained),
            flops=passes * self.tokens * forward_flops(model, length),
            states=ModelStates.of(
                [*model.parameters(), *added], trained, teacher, summed=summed, layer=layer
            ),
            activations=each,
            recomputed=again,
            logits=logits_bytes(model, seen, taught="distill" in self.losses and not cached),
            passes=self.accumulate,
            step_tokens=together * length,
            teacher=self.teacher,
            disk=blocks * length * bytes_each(self.teacher_top_k) if cached else 0,
        )


OF_ROUTERS = ("mode", "losses", "target_sparsity", "drive", "ramp", "vary", "beta", "router_lr")
"""Fields that concern routers and sparsity alone: the dense control has their defaults."""
OF_TEACHERS = ("teacher", "teacher_top_k")
"""Fields that concern a teacher alone: the dense control has none."""


def train(
    model: PreTrainedModel,
    step: Train,
    text: Text,
    work: Path,
    *,
    donor: PreTrainedModel | Donor | None = None,
    seed: int = 0,
    launch: Launch | None = None,
    held_out: Text | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Trains in place; checkpoints go to `work`, and the newest complete one is resumed.

    Args:
        model: dense or routed, in the dtype of its weights: bf16 weights get fp32 masters.
        step: what to train, how, and to which sparsity.
        text: of this step, in the order it is seen: blocks for a causal language model, labelled
            batches for a classifier, batches with targets for an encoder-decoder.
        work: folder of the checkpoints.
        donor: the dense teacher, for the losses that need one, where `step.teacher` says; loaded,
            or told where it is: then a cached one is not loaded once it is on the disk.
        seed: of dropout and fresh adapters.
        launch: the device, DeepSpeed, reporters; default: PyTorch alone, where the model is.
        held_out: what `evaluate_every` asks for; None: nothing is evaluated.
        weights: where they are, if the model is empty (on the meta device): each process then reads
            its share under ZeRO-3 (`born_sharded`), and at the end the first one alone has the
            model. None: the model has them, in every process, and so it has at the end.

    Returns:
        Last logged losses, the sparsity where routed, optimizer steps, the peak learning rate of
        the host's weights, and trained tokens.

    Raises:
        TimeIsUp: the time of the launch is up; a checkpoint of this optimizer step is written.
        ValueError: a loss that this model cannot have, no donor for one that needs it, too little
            text for the processes, a checkpoint of other processes or of another text, or a full
            disk; what `check_compiles` and `attention` refuse.
        FloatingPointError: the loss is NaN or infinite; the last good checkpoint is kept.
    """
    launch = launch or Launch(str(model.device))
    check_train(model, step, donor)
    check_learnable(model, text)
    batches = whole_batches(text, step)
    checkpoint = processes.on_first(lambda: newest_checkpoint(work))  # the same for all
    moved = check_layout(checkpoint, launch, step.accumulate)
    pinned = fingerprint(batches)
    check_text(checkpoint, pinned)
    if checkpoint is not None and moved and launch.zero_stage:  # 0 has all of it everywhere
        checkpoint, launch = reshaped(checkpoint, launch)
    if seen_kinds(step.losses) or step.drive in ZEROS or step.parts == "ffn":
        unfuse_experts(model)  # while it is whole, and before the optimizer holds it
    _check_launch(model, step, launch)
    if step.mode != "dense":
        set_mode(model, step.mode)
    steps = max(1, len(batches) // (step.accumulate * processes.count()))
    _warn_of_warmup(step, steps)
    looked_at = None
    if held_out is not None and step.evaluate_every:
        looked_at = HeldOut(in_batches(held_out, step.batch_size))
    flops = 0.0 if peak_of(launch) is None else step_flops(model, step, batches)
    with ExitStack() as lasting:
        lasting.enter_context(keep_freed_memory(model.device.type))
        teaching = lasting.enter_context(taught(step, donor, batches, pinned, work, launch))
        if weights is not None:
            lasting.enter_context(born_sharded.filled(model, weights, launch))
        step = in_numbers(model, step)
        lasting.enter_context(low_rank(model, step, seed))
        trained = trainable_parts(model, step)
        for each in (only_trainable(model, trained), tensorboard_in(launch.logs), zero.released()):
            lasting.enter_context(each)
        for host in (model, teaching.model):
            lasting.enter_context(attention(host, launch.attention))
        lasting.enter_context(compiled(model, launch.compile))
        trainer = RecipeTrainer(
            model,
            step,
            batches,
            work,
            steps,
            trained,
            teaching,
            seed,
            launch,
            held_out=looked_at,
            flops=flops,
        )
        trainer.text, trainer.everywhere = pinned, weights is None
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stopped:
            assert launch.limit is not None
            at = trainer.state.global_step
            raise launch.limit.stopped(f"after optimizer step {at:,} of {steps:,}")
        trainer.finish()
    _leave(model, step)
    measured = trainer.summary()
    if step.target_sparsity is not None:
        looks = 1 if step.vary else LOOKS  # those before the last were of what they drew
        warn_if_missed(measured["history"][-looks:], step.target_sparsity, step.drive)
    return {**measured, "lr": step.lr, "trained_tokens": token_count(batches)}


def _check_launch(model: PreTrainedModel, step: Train, launch: Launch) -> None:
    """Whether the step can be taken from where the model is now, as the launch says."""
    check_compiles(model, launch)
    if step.target_sparsity is not None and step.drive not in ZEROS:
        check_movable(model)
    if launch.zero_stage == 3 and needs_experts(step.losses):
        raise ValueError(
            "group_hoyer needs whole down projections, and ZeRO-3 has them in shards: use zero2"
        )


def _leave(model: PreTrainedModel, step: Train) -> None:
    """Leaves the model as it is used: experts on or off, beta where it rose to."""
    if step.mode in ("soft", "straight"):
        set_mode(model, "hard")
    if step.beta is not None:
        write_betas(model, step.beta)
    model.eval()


def _warn_of_warmup(step: Train, steps: int) -> None:
    """Logs a warning where a warm-up in steps is longer than the train step."""
    if isinstance(step.warmup, int) and step.warmup > steps:
        logger.warning(
            "the warm-up takes %d optimizer steps, but this train step has only %d: its learning "
            "rates end at %.3g of their peaks",
            step.warmup,
            steps,
            steps / step.warmup,
        )
