"""Time of an optimizer step: dense, and routed with every loss of a recipe, in one interleaved run.

Both models train with the loop of the train step: same text, same optimizer.

Letters: B blocks of a batch, T tokens of a block.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_tools.bench.rounds import in_turn, median_ratio, seconds
from moe_tools.checkpoint.loading import load
from moe_tools.data import Batch
from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import LEARNING
from moe_tools.freed_memory import keep_freed_memory
from moe_tools.recipe import Attach, Recipe, Split, Train
from moe_tools.steps.launch import Launch
from moe_tools.steps.schedules import Weight
from moe_tools.training.losses import needs_donor
from moe_tools.training.parts import trainable_parts
from moe_tools.training.teacher import Teaching
from moe_tools.training.trainer import RecipeTrainer

SCHEDULE_STEPS = 1000
"""Length of the schedules: long enough that none reaches its end."""


@dataclass(frozen=True)
class StepTiming:
    """One optimizer step; medians over the rounds."""

    step: str
    """dense, or the mode of the routed step."""
    tokens: int
    milliseconds: float
    ratio: float
    """Median of this step's time over the dense one's, round by round."""


def bench_train(
    source: str,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    length: int = 512,
    rounds: int = 5,
) -> list[StepTiming]:
    """Times a dense step and the first routed one of a recipe, on random tokens.

    Args:
        source: a dense model.
        recipe: its split, attach and first routed train step are timed, without a teacher: its
            pass is one of the dense model, where `teacher` says, and stands in for no other.
        dtype: of the host's weights.
        device: where.
        length: tokens of a block.
        rounds: that count; one before them does not.

    Raises:
        ValueError: no routed train step.
    """
    step = _routed_step(recipe)
    plain = Train(tokens=1, batch_size=step.batch_size, accumulate=step.accumulate, lr=step.lr)
    with keep_freed_memory(device), tempfile.TemporaryDirectory() as work:
        calls = {}
        for name, kind in (("dense", plain), (step.mode, step)):
            model = load(source, dtype=dtype, device=device)
            if kind.mode != "dense":
                _route(model, recipe, kind)
            calls[name] = _stepper(model, kind, length, Path(work), Launch(device))
        found = in_turn([partial(seconds, call) for call in calls.values()], rounds, warm_up=1)
    tokens = step.batch_size * step.accumulate * length
    return [
        StepTiming(name, tokens, 1e3 * statistics.median(own), median_ratio(own, found[0]))
        for name, own in zip(calls, found, strict=True)
    ]


def _routed_step(recipe: Recipe) -> Train:
    routed = [s for s in recipe.steps if isinstance(s, Train) and s.mode in LEARNING]
    if not routed:
        raise ValueError(
            f"recipe {recipe.name} has no soft, straight or weighted train step to time"
        )
    step = routed[0]
    losses: dict[str, Weight] = {"lm": 1.0}
    losses |= {name: weight for name, weight in step.losses.items() if not needs_donor([name])}
    return replace(step, losses=losses, teacher="whole")


def _route(model: PreTrainedModel, recipe: Recipe, step: Train) -> None:
    """Attaches fresh routers: their cost does not depend on what they learned."""
    size = next(s.expert_size for s in recipe.steps if isinstance(s, Split))
    attach = next(s for s in recipe.steps if isinstance(s, Attach))
    spec = Conversion("bench", size, attach.router, attach.selector)
    attach_experts(model, replace(spec, router_options=attach.router_options))
    assert step.mode != "dense"  # _routed_step
    set_mode(model, step.mode)


def _stepper(
    model: PreTrainedModel, step: Train, length: int, work: Path, launch: Launch
) -> Callable[[], None]:
    """Makes a call that takes one optimizer step, as the Trainer does."""
    drawn = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    size = (step.batch_size, length)
    batches = [
        Batch(torch.randint(vocabulary, size, generator=drawn)) for _ in range(step.accumulate)
    ]
    groups = trainable_parts(model, step)
    taught = Teaching()  # by nobody
    trainer = RecipeTrainer(model, step, batches, work, SCHEDULE_STEPS, groups, taught, 0, launch)
    trainer.state.max_steps = SCHEDULE_STEPS
    optimizer = trainer.create_optimizer()
    model.train()

    def call() -> None:
        trainer.enter_step(1, SCHEDULE_STEPS)
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)  # the host then reads the figures
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            inputs = {"input_ids": batch.ids_BT.to(launch.device)}
            (trainer.compute_loss(model, inputs) / step.accumulate).backward()
        trainer._clip_grad_norm(model)
        optimizer.step()
        optimizer.zero_grad()
        trainer.end_step()
        if torch.device(launch.device).type == "cuda":
            torch.cuda.synchronize()

    return call
