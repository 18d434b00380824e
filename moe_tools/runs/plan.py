"""What a recipe would do to a model: steps, tokens, FLOPs, memory and text, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.data.sources import mixture, parse_source
from moe_tools.measure.memory import STAGES, ModelStates, size
from moe_tools.recipe import Recipe
from moe_tools.runs.tasks import check_task
from moe_tools.steps.step import Cost, Setting, Step

PROCESSES = (1, 8, 64)
"""For which the memory is told, beside the number that is asked for: a GPU, a node, eight nodes."""


@dataclass(frozen=True)
class PlannedStep(Cost):
    """One step, as the recipe says, on the model that the steps before it leave."""

    verb: str = ""
    tokens: int = 0
    """Tokens of text that it trains on or calibrates with."""
    parameters: int = 0
    """Parameters of the model after it; a shared tensor counts once."""


@dataclass(frozen=True)
class Source:
    """Where text comes from."""

    name: str
    kind: str
    """docs, self, hub or file; a folder is a file, too."""
    there: bool | None
    """None: the hub was not asked."""
    tokens: int
    """That the recipe reads of it, once."""


@dataclass(frozen=True)
class Plan:
    """A recipe on a model."""

    recipe: str
    paper: str
    model: str
    host: str
    """Its class."""
    parameters: int
    processes: int
    """For which `optimizer_steps` are told."""
    steps: tuple[PlannedStep, ...]
    data: tuple[Source, ...]
    memory: dict[str, dict[str, float]]
    """Processes -> stage of ZeRO -> bytes of one of them, in the hungriest train step; where
    nothing is trained, the model's weights alone."""

    @property
    def tokens(self) -> int:
        """Training tokens of all steps."""
        return sum(step.tokens for step in self.steps if step.verb == "train")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the sums over train steps beside the fields."""
        sums = {
            "tokens": self.tokens,
            "optimizer_steps": sum(step.optimizer_steps for step in self.steps),
            "flops": sum(step.flops for step in self.steps),
        }
        return {**asdict(self), **sums}


def plan(
    recipe: Recipe, model: str, *, dtype: torch.dtype = torch.bfloat16, processes: int = 1
) -> Plan:
    """Rehearses a recipe on a model without numbers: a folder with a config.json is enough.

    Args:
        recipe: what would be run.
        model: folder, hub id or GGUF file; only its config is read.
        dtype: of the host's weights.
        processes: that would train together, each with the recipe's batch size and accumulation.

    Raises:
        ValueError: a step that is impossible for this model, or no model there.
    """
    recipe = recipe.counted()
    host = skeleton(model, dtype=dtype, task=recipe.task)
    check_task(recipe, host)
    before, donor_bytes = host.num_parameters(), size(host.parameters())
    setting = Setting(recipe.block_length, processes, donor_bytes)
    steps = tuple(_step(step, host, model, setting) for step in recipe.steps)
    states = [step.states for step in steps if step.states is not None]
    return Plan(
        recipe=recipe.name,
        paper=recipe.paper,
        model=model,
        host=type(host).__name__,
        parameters=before,
        processes=processes,
        steps=steps,
        data=tuple(_sources(recipe)),
        memory=_memory(states or [ModelStates(size(host.parameters()))], processes),
    )


def _step(step: Step, model: PreTrainedModel, donor: str, setting: Setting) -> PlannedStep:
    with torch.device("meta"):  # routers are made without numbers, too
        step.rehearse(model, donor)
    cost = vars(step.cost(model, setting))
    return PlannedStep(
        **cost, verb=step.verb, tokens=step.tokens, parameters=model.num_parameters()
    )


def _sources(recipe: Recipe) -> Iterator[Source]:
    wanted = max(recipe.train_tokens(), *(step.tokens for step in recipe.steps))
    mixed = mixture(recipe.data)
    whole = sum(weight for _, weight in mixed)
    for name, weight in mixed:
        tokens = round(wanted * weight / whole)
        found = parse_source(name)
        there = {"hub": None, "file": Path(found.name).exists()}.get(found.kind, True)
        yield Source(name, found.kind, there, tokens)


def _memory(states: Sequence[ModelStates], processes: int) -> dict[str, dict[str, float]]:
    return {
        str(count): {
            str(stage): max(one.per_process(stage, count) for one in states) for stage in STAGES
        }
        for count in sorted({*PROCESSES, processes})
    }
