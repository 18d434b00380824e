"""The loop of a train step: transformers' Trainer with our losses, optimizer and checkpoints.

Letters: B blocks of a batch, T tokens of a block, V vocabulary, D model width, E experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerControl

from moe_tools import processes
from moe_tools.data import Batch, Batches
from moe_tools.experts.conversion import divided
from moe_tools.experts.experts import Routing, every_expert_on, expert_ffns
from moe_tools.experts.line import add_
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.isolation import prove_isolation
from moe_tools.names import IGNORE
from moe_tools.steps.launch import Launch
from moe_tools.steps.schedules import rate_factor
from moe_tools.training import checkpointing, zero
from moe_tools.training.arguments import BatchItems, batch_of, only, training_arguments
from moe_tools.training.cached_teacher import as_logp
from moe_tools.training.checkpoints import CheckpointingTrainer
from moe_tools.training.figures import Figures, sparsity_of, zeros_of
from moe_tools.training.following import Following
from moe_tools.training.held_out import HeldOut
from moe_tools.training.logit_losses import logit_losses
from moe_tools.training.loss_weights import LossWeights
from moe_tools.training.losses import (
    Observed,
    compute_losses,
    needs_donor,
    needs_experts,
    seen_kinds,
)
from moe_tools.training.optimizer import MasterAdamW
from moe_tools.training.progress import Progress, in_words
from moe_tools.training.sharpen import sharpening
from moe_tools.training.teacher import Teaching
from moe_tools.training.throughput import Throughput, peak_of
from moe_tools.training.token_shares import token_shares
from moe_tools.training.top_k_losses import top_k_losses
from moe_tools.training.watch import Kind, watch_ffns

if TYPE_CHECKING:
    from moe_tools.training.train import Train

logger = logging.getLogger(__name__)

DRIVE = "moe_tools_drive"
"""Where a checkpoint keeps the state of the drive."""
LOSS = "the loss"
"""The figure that is trained on, which must be finite; the Trainer logs it itself."""
TOKENS = "tokens"
"""The figure that counts what a pass saw."""


class RecipeTrainer(CheckpointingTrainer):
    """Runs the loop of a train step, with our losses and our optimizer."""

    train_dataset: BatchItems
    everywhere: bool = True
    """Whether every process gets the whole model back at the end, and not the first alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        step: Train,
        batches: Sequence[Batch],
        work: Path,
        steps: int,
        groups: list[dict[str, Any]],
        teaching: Teaching,
        seed: int,
        launch: Launch,
        *,
        held_out: HeldOut | None = None,
        flops: float = 0.0,
    ) -> None:
        """Takes what `train` prepared; `flops` are those of training one token."""
        self.held_out, self.throughput = held_out, Throughput(flops, peak_of(launch))
        self.stopped = False
        """Whether the time of the run was up before the last optimizer step."""
        self.step, self.steps, self.groups, self.launch = step, steps, groups, launch
        self.donor = None if teaching.model is None else teaching.model.eval()
        self.weights = LossWeights(step)
        add = zero.add_ if launch.deepspeed is not None else add_
        self.following = Following(model, step, steps, self.weights, add)
        self.sharpening = sharpening(model, step.beta, step.ramp)
        self.options = {"use_cache": False} if model.can_generate() else {}
        self.even = _even(batches)
        """Whether every pass learns as many tokens."""
        self.shares: list[Tensor] = []
        """Of the passes of this optimizer step that are to come; empty where all count alike."""
        self.figures, self.read = Figures(), dict[str, float]()
        self.adamw: MasterAdamW | None = None
        self.sums = False
        """Whether the gradients of several passes are added in fp32, apart from the weights."""
        self.last: dict[str, float] = {}
        self.dtypes = {name: param.dtype for name, param in model.named_parameters()}
        if launch.zero_stage == 3:
            zero.gather_for_routers(model)
        bf16 = torch.bfloat16 in self.dtypes.values()
        self.finer = zero.take_finer(model) if bf16 and launch.deepspeed is not None else {}
        super().__init__(
            model=model,
            args=training_arguments(step, work, steps, seed, launch, bf16=bf16),
            train_dataset=BatchItems(batches, teaching.cached),
            data_collator=only,
            callbacks=[Progress(self, f"train {step.mode}")],
        )
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False  # no labels are counted: a loss is a pass's mean
        for printer in (PrinterCallback, ProgressCallback):  # standard output is for results
            self.remove_callback(printer)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes AdamW with fp32 masters: ours, or DeepSpeed's around PyTorch's."""
        if self.optimizer is None:
            options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
            if self.launch.deepspeed is not None:
                self.optimizer = torch.optim.AdamW(self.groups, **options)
            else:
                self.optimizer = self.adamw = MasterAdamW(self.groups, **options)
                self.sums = self.adamw.copies and self.step.accumulate > 1
                if self.sums:
                    self.adamw.sum_in_fp32()
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; afterwards nothing of the optimizer stays on the model."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.adamw is not None:
                self.adamw.close()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Runs one pass. DistributedDataParallel would exchange bf16 gradients, not their sums."""
        with self.accelerator.no_sync(model) if self.sums else nullcontext():
            return super().training_step(model, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.adamw is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if self.sums:
            self.adamw.average()
        return self.adamw.clip(self.args.max_grad_norm)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule of every group: a warm-up, then down to its floor."""
        step = self.step
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(),
                lambda at: rate_factor(at, self.steps, step.warmup, step.floor, step.schedule),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collects the passes of an optimizer step, and weighs them by their learned tokens."""
        samples, number = super().get_batch_samples(*args, **kwargs)
        if samples and not self.even:
            self.shares = token_shares([*map(batch_of, samples)], self.args.device)
        return samples, number

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns the weighted sum of the recipe's losses on one batch."""
        batch = batch_of(inputs)
        routed = bool(expert_ffns(self.model))
        recording: AbstractContextManager[list[Routing]] = (
            record_routing(self.model) if routed else nullcontext([])
        )
        weights = self.weights.now
        kinds = seen_kinds(weights)
        with recording as routings, watch_ffns(self.model, kinds) as ffns:
            logits = self._logits(model, batch)
        donor_logits, donor_outputs = self._donor_pass(batch, kinds & {"outputs"})
        labels = batch.next_labels_BT().flatten() if batch.labels_B is None else batch.labels_B
        given = {f"{name}_weight": weights.get(name, 0.0) for name in ("lm", "distill")}
        said = inputs.get("teacher_ids"), inputs.get("teacher_logp")
        if said[0] is not None and said[1] is not None:
            total, parts = top_k_losses(logits, labels, said[0], as_logp(said[1]), **given)
        else:
            total, parts = logit_losses(logits, labels, donor_logits, **given)
        if self.shares:
            total = total * self.shares.pop(0)
        routings = [each.without_padding() for each in routings if each.tokens]  # see HostExperts
        hidden, pre = ([h_TF for h_TF in found if len(h_TF)] for found in (ffns.hidden, ffns.pre))
        experts = []
        if needs_experts(weights):
            of, pairs = divided(self.model), zip(ffns.hidden_of, ffns.hidden, strict=True)
            experts = [of[name] for name, h_TF in pairs if len(h_TF)]
        seen = Observed(routings, ffns.outputs, donor_outputs, hidden, pre, experts)
        values = {"lm": parts.lm}
        if donor_logits is not None or said[0] is not None:
            values["distill"] = parts.distill
        for name, value in compute_losses(weights, seen).items():
            values[name] = value
            total = total + weights[name] * value
        values[LOSS] = total
        values[TOKENS] = _tokens(batch)
        self._note(values, routings, hidden)
        if self.accelerator.sync_gradients:  # the last pass: DeepSpeed steps in its backward pass
            self._read()
        return total

    def _read(self) -> None:
        """Reads the figures of an optimizer step before it changes a weight.

        Together, so that no process waits for one that has stopped.
        """
        self.read = self.figures.means()
        passes = self.figures.passes * processes.count()
        self.throughput.add(self.read.pop(TOKENS) * passes)
        if not math.isfinite(self.read.pop(LOSS)):
            mine = self.figures.mine(LOSS)
            loss = "not finite in another process" if math.isfinite(mine) else f"{mine}"
            raise FloatingPointError(
                f"the loss is {loss} at optimizer step {self.state.global_step}: lower the "
                "learning rates; the last good checkpoint is kept"
            )

    def _donor_pass(
        self, batch: Batch, kinds: set[Kind]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self.donor is None or not needs_donor(self.weights.now):
            return None, {}
        with torch.no_grad(), watch_ffns(self.donor, kinds) as ffns:
            logits = self._logits(self.donor, batch)
        return (logits if "distill" in self.weights.now else None), ffns.outputs

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns (tokens, vocabulary) of a language model, (rows, classes) of a classifier.

        Of an encoder-decoder the tokens are those that it says; of a regression there is one class.
        """
        host = self.donor if model is self.donor else self.model  # `model` may be wrapped
        assert host is not None
        return model(**model_inputs(host, batch), **self.options).logits.flatten(0, -2)

    @torch.no_grad()
    def _note(
        self, values: dict[str, Tensor], routings: list[Routing], hidden_TF: list[Tensor]
    ) -> None:
        if routings:
            values["sparsity"] = sparsity_of(routings)
        if hidden_TF:
            values["zeros"] = zeros_of(hidden_TF)
        self.figures.add(values)
        self.following.note(routings)

    def end_step(self) -> None:
        """Ends an optimizer step: follows the reference, and keeps what is logged."""
        self.last = self.read | self.weights.moving()
        self.figures = Figures()
        at = self.state.global_step
        self.last |= self.following.follow(self.last, at)
        if self._evaluates:
            self.last |= self._measure()
        self.following.vary(at)
        self.state.stateful_callbacks[DRIVE] = {**self.following.state(), "last": self.last}

    @property
    def _evaluates(self) -> bool:
        """Whether the optimizer step that ends now is one after which held-out text is read."""
        at = self.state.global_step
        if self.held_out is None:
            return False
        return at % self.step.evaluate_every == 0 or at == self.state.max_steps

    def _measure(self) -> dict[str, float]:
        called = self.deepspeed if self.is_deepspeed_enabled else self.model
        assert self.held_out is not None and called is not None
        with self.throughput.pause():
            return self.held_out.measure(
                called, self.model, self.state.global_step, self.args.device
            )

    def steer(self, control: TrainerControl) -> None:
        """Says what the Trainer does after an optimizer step, beside what is due anyway."""
        if self._evaluates:
            control.should_log = True
        limit, last = self.launch.limit, self.state.global_step >= self.state.max_steps
        if limit is not None and not last and limit.is_up():
            self.stopped = control.should_save = control.should_training_stop = True

    def begin(self) -> None:
        """Goes on where a checkpoint stopped, or begins; called before the first step of a run."""
        batches = self.train_dataset.batches
        if isinstance(batches, Batches) and batches.packing == "isolated":
            assert isinstance(self.model, PreTrainedModel)
            with every_expert_on(self.model):  # a router in bf16 may turn on a rounding
                prove_isolation(self.model)
        if self.state.global_step == 0:
            for name, value in self.finer.items():
                param = self.model.get_parameter(name)
                zero.set_(param, zero.from_shares(value, param))
        if self.state.global_step and self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            zero.complete_resume(engine.basic_optimizer, self.lr_scheduler)
        saved = self.state.stateful_callbacks.get(DRIVE)
        if saved is not None:
            self.last = saved["last"]
            self.following.resume(saved, self.state.global_step)
        self.throughput.restart()

    def enter_step(self, step: int, steps: int) -> None:
        """Sets what changes from one optimizer step to the next, counted from 1."""
        self.weights.enter(step, steps)
        if self.sharpening is not None:
            self.sharpening.enter(step, steps)

    def finish(self) -> None:
        """Makes the model plain again, whatever trained it."""
        if self.step.checkpointing:
            getattr(self.model, f"{checkpointing.NAME}_disable")()
        if self.is_deepspeed_enabled:
            zero.make_plain(self.model, self.deepspeed, self.dtypes, everywhere=self.everywhere)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds our figures to the Trainer's, and says them."""
        speed = self.throughput.take()
        super().log({**logs, **self.last, **speed}, *args, **kwargs)
        at, steps = self.state.global_step, self.state.max_steps
        logger.info("%s %d/%d  %s", self.step.mode, at, steps, in_words(self.last | speed))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.throughput.pause():
            super()._save_checkpoint(*args, **kwargs)

    def summary(self) -> dict[str, Any]:
        """Returns what the run folder keeps of this train step."""
        history = [entry for entry in self.state.log_history if "lm" in entry]
        return {**self.last, "steps": self.state.global_step, "history": history}

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        """Takes the batches in order: the data layer has shuffled them, for every run alike."""
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _even(batches: Sequence[Batch]) -> bool:
    if isinstance(batches, Batches):
        return batches.even
    return all(batch.targets_BS is None for batch in batches)


def _tokens(batch: Batch) -> Tensor:
    """As `Batch.tokens`, where the batch is: the host does not wait for it."""
    seen = batch.ids_BT.new_full((), batch.ids_BT.numel())
    if batch.mask_BT is not None:
        seen = batch.mask_BT.sum()
    return seen if batch.targets_BS is None else seen + (batch.targets_BS != IGNORE).sum()
