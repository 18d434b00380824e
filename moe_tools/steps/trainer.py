"""The loop of a train step: transformers' Trainer with our losses, optimizer and checkpoints.

Letters: B blocks of a batch, T tokens of a block, V vocabulary, D model width, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moe_tools.data import Batch
from moe_tools.model.experts import expert_ffns
from moe_tools.model.inputs import model_inputs
from moe_tools.model.routing import Routing, record_routing, routing_sparsity
from moe_tools.model.zeros import zero_share
from moe_tools.recipe import Train
from moe_tools.steps.controller import Reference, followed
from moe_tools.steps.logit_losses import IGNORE, logit_losses
from moe_tools.steps.losses import DONOR_LOSSES, LOGIT_LOSSES, LOSSES, WATCHED, Observed
from moe_tools.steps.optimizer import MasterAdamW
from moe_tools.steps.schedules import warmup_cosine
from moe_tools.steps.trim import sample_logits, shift_routers
from moe_tools.steps.watch import Kind, watch_ffns
from moe_tools.steps.weight_file import load_weights, save_weights
from moe_tools.steps.weights import LossWeights

logger = logging.getLogger(__name__)

DRIVE = "moe_tools_drive"
"""Where a checkpoint keeps the state of the drive."""


class _Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One item is a whole batch: rows come in the order and the groups that the data layer made."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_BT, labels_B = self.batches[index]
        return {"input_ids": ids_BT} | ({} if labels_B is None else {"labels": labels_B})


def _only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (item,) = items
    return item


class RecipeTrainer(Trainer):
    """The loop, with our losses, our optimizer and checkpoints without pickled arguments."""

    model: nn.Module
    train_dataset: _Batches
    state: Any  # `stateful_callbacks` is annotated as what it is made from

    def __init__(
        self,
        model: PreTrainedModel,
        step: Train,
        batches: Sequence[Batch],
        work: Path,
        steps: int,
        groups: list[dict[str, Any]],
        donor: PreTrainedModel | None,
        seed: int,
    ) -> None:
        self.step = step
        self.donor = None if donor is None else donor.eval()
        self.weights = LossWeights(step)
        self.options = {"use_cache": False} if model.can_generate() else {}
        self.start: float | None = None
        self.logits: list[Tensor] = []
        self.sums: dict[str, float] = {}
        self.passes = 0
        self.last: dict[str, float] = {}
        optimizer = MasterAdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda at: warmup_cosine(at, steps, step.warmup)
        )
        super().__init__(
            model=model,
            args=_arguments(step, work, steps, seed, on_cpu=model.device.type == "cpu"),
            train_dataset=_Batches(batches),
            data_collator=_only,
            optimizers=(optimizer, schedule),
            callbacks=[_Control(self)],
        )
        self.loss_is_scaled_for_ga = False
        for printer in (PrinterCallback, ProgressCallback):  # standard output is for results
            self.remove_callback(printer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The weighted sum of the recipe's losses on one batch."""
        ids_BT, labels_B = inputs["input_ids"], inputs.get("labels")
        routed = bool(expert_ffns(model))
        recording: AbstractContextManager[list[Routing]] = (
            record_routing(model) if routed else nullcontext([])
        )
        weights = self.weights.now
        kinds = {WATCHED[name] for name in weights if name in WATCHED}
        with recording as routings, watch_ffns(model, kinds) as ffns:
            logits = self._logits(model, ids_BT)
        donor_logits, donor_outputs = self._donor_pass(ids_BT, kinds & {"outputs"})
        total, parts = logit_losses(
            logits,
            next_token_labels(ids_BT).flatten() if labels_B is None else labels_B,
            donor_logits,
            lm_weight=weights.get("lm", 0.0),
            distill_weight=weights.get("distill", 0.0),
        )
        seen = Observed(routings, ffns.outputs, donor_outputs, ffns.hidden, ffns.pre)
        values = {"lm": parts.lm}
        if donor_logits is not None:
            values["distill"] = parts.distill
        for name, weight in weights.items():
            if name not in LOGIT_LOSSES:
                values[name] = LOSSES[name](seen)
                total = total + weight * values[name]
        self._note(values, routings, ffns.hidden)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total.item()} at optimizer step {self.state.global_step}: lower the "
                "learning rates; the last good checkpoint is kept"
            )
        return total

    def _donor_pass(
        self, ids_BT: Tensor, kinds: set[Kind]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self.donor is None or not set(self.weights.now) & set(DONOR_LOSSES):
            return None, {}
        with torch.no_grad(), watch_ffns(self.donor, kinds) as ffns:
            logits = self._logits(self.donor, ids_BT)
        return (logits if "distill" in self.weights.now else None), ffns.outputs

    def _logits(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """(tokens, vocabulary) of a language model, (rows, classes) of a classifier."""
        return model(**model_inputs(model, ids_BT), **self.options).logits.flatten(0, -2)

    @torch.no_grad()
    def _note(
        self, values: dict[str, Tensor], routings: list[Routing], hidden_TF: list[Tensor]
    ) -> None:
        noted = {name: value.item() for name, value in values.items()}
        if routings:
            noted["sparsity"] = routing_sparsity(routings)
        if hidden_TF:
            noted["zeros"] = zero_share(hidden_TF)
        for name, value in noted.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.passes += 1
        if routings and self.step.target_sparsity is not None:
            self.logits.append(sample_logits(self.model, routings))

    def end_step(self) -> None:
        """After an optimizer step: follow the reference, keep what is logged."""
        self.last = {name: value / self.passes for name, value in self.sums.items()}
        self.sums, self.passes = {}, 0
        self.last |= self.weights.moving()
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
        else:
            shift_routers(self.model, torch.cat(self.logits), reference, damping=0.5)
        self.logits = []

    def begin(self) -> None:
        """Before the first step, or the first after a resume."""
        saved = self.state.stateful_callbacks.get(DRIVE)
        if saved is not None:
            self.start, self.last = saved["start"], saved["last"]
            self.weights.resume(saved["controller"])

    def _reference(self) -> Reference:
        assert self.start is not None and self.step.target_sparsity is not None
        ramp = 0.0 if self.step.mode == "hard" else self.step.ramp
        return Reference(self.start, self.step.target_sparsity, self.state.max_steps, ramp)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds our figures to the Trainer's, and says them."""
        super().log({**logs, **self.last}, *args, **kwargs)
        at, steps = self.state.global_step, self.state.max_steps
        logger.info("%s %d/%d  %s", self.step.mode, at, steps, _figures(self.last))

    def summary(self) -> dict[str, Any]:
        """What the run folder keeps of this step."""
        history = [entry for entry in self.state.log_history if "lm" in entry]
        return {**self.last, "steps": self.state.global_step, "history": history}

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        """In order: the blocks come shuffled, and every run sees them in the same order."""
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self._check_weights()
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / "model.safetensors")

    def _check_weights(self) -> None:
        """A gradient that overflows spoils the weights before any loss shows it."""
        for name, param in self.model.named_parameters():
            if not torch.isfinite(param).all():
                raise FloatingPointError(
                    f"{name} is not finite after optimizer step {self.state.global_step}: lower "
                    "the learning rates; the last good checkpoint is kept"
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint) / "model.safetensors")


def next_token_labels(blocks_BT: Tensor) -> Tensor:
    """The token after each, `IGNORE` at the end of a block."""
    return nn.functional.pad(blocks_BT[:, 1:], (0, 1), value=IGNORE)


def _arguments(
    step: Train, work: Path, steps: int, seed: int, *, on_cpu: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item is a batch
        gradient_accumulation_steps=step.accumulate,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=step.checkpoint_every,
        save_total_limit=2,
        logging_steps=10,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=on_cpu,
        seed=seed,
        dataloader_pin_memory=False,
    )


class _Control(TrainerCallback):
    """Tells our trainer when a step ends, and shows the progress on a terminal."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"train {self.trainer.step.mode}",
            disable=None,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.weights.enter(state.global_step + 1, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()
        self.bar.update()
        self.bar.set_postfix_str(_figures(self.trainer.last))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _figures(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
