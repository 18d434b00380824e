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
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback

from moe_tools import processes
from moe_tools.data import Batch
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.inputs import model_inputs
from moe_tools.names import IGNORE
from moe_tools.steps.launch import Launch
from moe_tools.steps.schedules import warmup_cosine
from moe_tools.training import checkpointing, zero
from moe_tools.training.arguments import Batches, only, training_arguments
from moe_tools.training.cached_teacher import as_logp
from moe_tools.training.checkpoints import CheckpointingTrainer
from moe_tools.training.controller import Reference, followed
from moe_tools.training.figures import Figures, sparsity_of, zeros_of
from moe_tools.training.logit_losses import logit_losses
from moe_tools.training.loss_weights import LossWeights
from moe_tools.training.losses import Observed, compute_losses, needs_donor, seen_kinds
from moe_tools.training.optimizer import MasterAdamW
from moe_tools.training.progress import Progress, in_words
from moe_tools.training.teacher import Teaching
from moe_tools.training.top_k_losses import top_k_losses
from moe_tools.training.trim import add_, sample_logits, shift_routers
from moe_tools.training.watch import Kind, watch_ffns

if TYPE_CHECKING:
    from moe_tools.training.train import Train

logger = logging.getLogger(__name__)

DRIVE = "moe_tools_drive"
"""Where a checkpoint keeps the state of the drive."""
LOSS = "the loss"
"""The figure that is trained on, which must be finite; the Trainer logs it itself."""


class RecipeTrainer(CheckpointingTrainer):
    """Runs the loop of a train step, with our losses and our optimizer."""

    train_dataset: Batches
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
    ) -> None:
        self.step, self.steps, self.groups, self.launch = step, steps, groups, launch
        self.donor = None if teaching.model is None else teaching.model.eval()
        self.weights = LossWeights(step)
        self.options = {"use_cache": False} if model.can_generate() else {}
        self.start: float | None = None
        self.logits: list[Tensor] = []
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
            train_dataset=Batches(batches, teaching.cached),
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
        """Makes the schedule of every group: a warmup, then a cosine."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(),
                lambda at: warmup_cosine(at, self.steps, self.step.warmup),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns the weighted sum of the recipe's losses on one batch."""
        ids_BT, labels_B = inputs["input_ids"], inputs.get("labels")
        routed = bool(expert_ffns(self.model))
        recording: AbstractContextManager[list[Routing]] = (
            record_routing(self.model) if routed else nullcontext([])
        )
        weights = self.weights.now
        kinds = seen_kinds(weights)
        with recording as routings, watch_ffns(self.model, kinds) as ffns:
            logits = self._logits(model, ids_BT)
        donor_logits, donor_outputs = self._donor_pass(ids_BT, kinds & {"outputs"})
        labels = next_token_labels(ids_BT).flatten() if labels_B is None else labels_B
        given = {f"{name}_weight": weights.get(name, 0.0) for name in ("lm", "distill")}
        said = inputs.get("teacher_ids"), inputs.get("teacher_logp")
        if said[0] is not None and said[1] is not None:
            total, parts = top_k_losses(logits, labels, said[0], as_logp(said[1]), **given)
        else:
            total, parts = logit_losses(logits, labels, donor_logits, **given)
        routings = [routing for routing in routings if routing.tokens]  # see HostExperts
        hidden, pre = ([h_TF for h_TF in found if len(h_TF)] for found in (ffns.hidden, ffns.pre))
        seen = Observed(routings, ffns.outputs, donor_outputs, hidden, pre)
        values = {"lm": parts.lm}
        if donor_logits is not None or said[0] is not None:
            values["distill"] = parts.distill
        for name, value in compute_losses(weights, seen).items():
            values[name] = value
            total = total + weights[name] * value
        values[LOSS] = total
        self._note(values, routings, hidden)
        if self.accelerator.sync_gradients:  # the last pass: DeepSpeed steps in its backward pass
            self._read()
        return total

    def _read(self) -> None:
        """Reads the figures of an optimizer step before it changes a weight.

        Together, so that no process waits for one that has stopped.
        """
        self.read = self.figures.means()
        if not math.isfinite(self.read.pop(LOSS)):
            mine = self.figures.mine(LOSS)
            loss = "not finite in another process" if math.isfinite(mine) else f"{mine}"
            raise FloatingPointError(
                f"the loss is {loss} at optimizer step {self.state.global_step}: lower the "
                "learning rates; the last good checkpoint is kept"
            )

    def _donor_pass(
        self, ids_BT: Tensor, kinds: set[Kind]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self.donor is None or not needs_donor(self.weights.now):
            return None, {}
        with torch.no_grad(), watch_ffns(self.donor, kinds) as ffns:
            logits = self._logits(self.donor, ids_BT)
        return (logits if "distill" in self.weights.now else None), ffns.outputs

    def _logits(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """Returns (tokens, vocabulary) of a language model, (rows, classes) of a classifier."""
        host = self.donor if model is self.donor else self.model  # `model` may be wrapped
        assert host is not None
        return model(**model_inputs(host, ids_BT), **self.options).logits.flatten(0, -2)

    @torch.no_grad()
    def _note(
        self, values: dict[str, Tensor], routings: list[Routing], hidden_TF: list[Tensor]
    ) -> None:
        if routings:
            values["sparsity"] = sparsity_of(routings)
        if hidden_TF:
            values["zeros"] = zeros_of(hidden_TF)
        self.figures.add(values)
        if routings and self._shifts:
            passes = self.step.accumulate * processes.count()
            self.logits.append(sample_logits(self.model, routings, passes))

    def end_step(self) -> None:
        """Ends an optimizer step: follows the reference, and keeps what is logged."""
        self.last = self.read | self.weights.moving()
        self.figures = Figures()
        if self.step.target_sparsity is not None:
            self._follow()
        self.state.stateful_callbacks[DRIVE] = {
            "start": self.start,
            "controller": self.weights.state(),
            "last": self.last,
        }

    def _follow(self) -> None:
        measured = followed(self.last, self.step.drive)
        if self.start is None:
            self.start = measured
        self.last["reference"] = reference = self._reference().at(self.state.global_step)
        if self.weights.controller is not None:
            self.weights.controller.update(reference, measured)
        if self._shifts:
            logits_S = processes.gather_rows(torch.cat(self.logits))
            add = zero.add_ if self.is_deepspeed_enabled else add_
            shift_routers(self.model, logits_S, reference, damping=0.5, add=add)
        self.logits = []

    @property
    def _shifts(self) -> bool:
        """Whether the threshold of the routers is shifted, and no weight of a loss is turned."""
        return self.step.target_sparsity is not None and self.weights.controller is None

    def begin(self) -> None:
        """Goes on where a checkpoint stopped, or begins; called before the first step of a run."""
        if self.state.global_step == 0:
            for name, value in self.finer.items():
                param = self.model.get_parameter(name)
                zero.set_(param, zero.from_shares(value, param))
        if self.state.global_step and self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            zero.complete_resume(engine.basic_optimizer, self.lr_scheduler)
        saved = self.state.stateful_callbacks.get(DRIVE)
        if saved is not None:
            self.start, self.last = saved["start"], saved["last"]
            self.weights.resume(saved["controller"])

    def enter_step(self, step: int, steps: int) -> None:
        """Sets the weights of the losses for an optimizer step, counted from 1."""
        self.weights.enter(step, steps)

    def finish(self) -> None:
        """Makes the model plain again, whatever trained it."""
        if self.step.checkpointing:
            getattr(self.model, f"{checkpointing.NAME}_disable")()
        if self.is_deepspeed_enabled:
            zero.make_plain(self.model, self.deepspeed, self.dtypes, everywhere=self.everywhere)

    def _reference(self) -> Reference:
        assert self.start is not None and self.step.target_sparsity is not None
        ramp = 0.0 if self.step.mode == "hard" else self.step.ramp
        return Reference(self.start, self.step.target_sparsity, self.state.max_steps, ramp)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds our figures to the Trainer's, and says them."""
        super().log({**logs, **self.last}, *args, **kwargs)
        at, steps = self.state.global_step, self.state.max_steps
        logger.info("%s %d/%d  %s", self.step.mode, at, steps, in_words(self.last))

    def summary(self) -> dict[str, Any]:
        """Returns what the run folder keeps of this train step."""
        history = [entry for entry in self.state.log_history if "lm" in entry]
        return {**self.last, "steps": self.state.global_step, "history": history}

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        """Takes the batches in order: the data layer has shuffled them, for every run alike."""
        return torch.utils.data.SequentialSampler(self.train_dataset)


def next_token_labels(blocks_BT: Tensor) -> Tensor:
    """Returns the token after each, and `IGNORE` at the end of a block."""
    return nn.functional.pad(blocks_BT[:, 1:], (0, 1), value=IGNORE)
