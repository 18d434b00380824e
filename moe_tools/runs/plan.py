"""What a recipe would do to a model, and what it takes: all from shapes, before any work.

Tokens, FLOPs and states are of each step (`moe_tools.steps.step.Cost`). This file lays them on a
machine: hours, memory of a card and of a host, what the network carries, what the disk holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.data.packing import IN_MEMORY
from moe_tools.data.sources import mixture, parse_source
from moe_tools.measure.gpus import gpu
from moe_tools.measure.memory import WAYS, ModelStates, Way, size
from moe_tools.measure.network import sent_bytes
from moe_tools.recipe import Recipe
from moe_tools.runs.tasks import check_task
from moe_tools.steps.step import Cost, Setting, Step

PROCESSES = (1, 8, 64)
"""For which the memory is told, beside the number that is asked for: a GPU, a node, eight nodes."""
MFU = 0.3
"""Share of a card's FLOP/s that a plan counts on. Published runs have 0.17 to 0.52 (docs/scale.md),
from trainers made for one model, which this is not; recomputing counts as work here."""
ROOM = 0.9
"""Share of a card's memory that a plan fills: buffers and the allocator have the rest."""
CHECKPOINTS = 3
"""That a train step has on the disk while it writes one: two are kept."""
SHORT_IDS = 2**16
"""A vocabulary of so many ids or fewer is stored in 2 bytes a token (`moe_tools.data.shards`)."""


@dataclass(frozen=True)
class Machine:
    """Where a plan runs."""

    gpu: str = "A100-80GB"
    """One of `moe_tools.measure.gpus.GPUS`, or the beginning of its name."""
    processes: int = 1
    """That train together, one a card."""
    per_node: int = 8
    """Cards of a node."""
    mfu: float = MFU
    """Share of the card's FLOP/s that training gets, in (0, 1]."""
    network: float = 400.0
    """Gbit/s into each node."""

    def __post_init__(self) -> None:
        if self.processes < 1 or self.per_node < 1:
            raise ValueError(
                f"{self.processes} processes on nodes of {self.per_node} cards: give at least 1"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}, but must be above 0 and at most 1")
        if self.network <= 0:
            raise ValueError(f"network is {self.network} Gbit/s, but must be above 0")
        object.__setattr__(self, "gpu", gpu(self.gpu)[0])

    @property
    def on_host(self) -> int:
        """Processes of one node."""
        return min(self.processes, self.per_node)

    def hours(self, flops: float) -> float:
        """Hours that all cards together take."""
        return flops / (self.processes * gpu(self.gpu)[1].flops * self.mfu) / 3600

    def sending(self, sent: float) -> float:
        """Seconds to send so many bytes from each process, round a ring of all of them.

        Within a node at the speed of its links; between nodes every node passes on the ring at the
        speed of its network, however many cards it has.
        """
        link = gpu(self.gpu)[1].link
        if self.processes > self.per_node:
            link = min(link, self.network * 1e9 / 8)
        return sent / link


@dataclass(frozen=True)
class PlannedStep(Cost):
    """One step, as the recipe says, on the model that the steps before it leave."""

    verb: str = ""
    tokens: int = 0
    """Tokens of text that it trains on or calibrates with."""
    parameters: int = 0
    """Parameters of the model after it; a shared tensor counts once."""
    hours: float = 0.0
    """Of a train step, on the plan's machine."""


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
    disk: int = 0
    """Bytes of these tokens, written down once; a text that fits in memory is not."""


@dataclass(frozen=True)
class Need:
    """What training takes on the plan's machine, divided in one way; of the hungriest step."""

    way: str
    """One of `moe_tools.measure.memory.WAYS`."""
    gpu: float
    """Bytes on a card: states, activations and logits."""
    gpu_recomputed: float
    """The same with `checkpointing: true`."""
    fits: bool
    """On a card of the machine, as the recipe is."""
    fits_recomputed: bool
    host: float
    """Bytes in the memory of a node."""
    sent: float
    """Bytes that each process sends for one optimizer step."""
    sending: float
    """Seconds of that, if nothing is computed meanwhile."""


@dataclass(frozen=True)
class Plan:
    """A recipe on a model."""

    recipe: str
    paper: str
    model: str
    host: str
    """Its class."""
    parameters: int
    machine: Machine
    """For which steps, hours and needs are told."""
    steps: tuple[PlannedStep, ...]
    data: tuple[Source, ...]
    memory: dict[str, dict[str, float]]
    """Processes -> how states are divided -> bytes of one process, in the hungriest train step;
    where nothing is trained, the model's weights alone."""
    needs: tuple[Need, ...]
    """On this machine; empty where nothing is trained."""
    checkpoints: int
    """Bytes of the checkpoints of the largest train step."""
    folder: int
    """Bytes of the weights that are left at the end."""

    @property
    def processes(self) -> int:
        """For which `optimizer_steps` are told."""
        return self.machine.processes

    @property
    def tokens(self) -> int:
        """Training tokens of all steps."""
        return sum(step.tokens for step in self.steps if step.verb == "train")

    @property
    def flops(self) -> float:
        """Of all train steps."""
        return sum(step.flops for step in self.steps)

    @property
    def hours(self) -> float:
        """Of all train steps."""
        return sum(step.hours for step in self.steps)

    @property
    def step_seconds(self) -> float:
        """Seconds that an optimizer step computes, the slowest of all."""
        trains = [step for step in self.steps if step.optimizer_steps]
        return max((3600 * step.hours / step.optimizer_steps for step in trains), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the sums over train steps beside the fields."""
        sums = {
            "processes": self.processes,
            "tokens": self.tokens,
            "optimizer_steps": sum(step.optimizer_steps for step in self.steps),
            "flops": self.flops,
            "hours": self.hours,
            "step_seconds": self.step_seconds,
        }
        return {**asdict(self), **sums}


def plan(
    recipe: Recipe,
    model: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    processes: int = 1,
    machine: Machine | None = None,
) -> Plan:
    """Rehearses a recipe on a model without numbers: a folder with a config.json is enough.

    Args:
        recipe: what would be run.
        model: folder, hub id or GGUF file; only its config is read.
        dtype: of the host's weights.
        processes: that would train together, each with the recipe's batch size and accumulation.
        machine: where; it has its own number of processes. Default: a card each of the default.

    Raises:
        ValueError: a step that is impossible for this model, or no model there.
    """
    machine = machine or Machine(processes=processes)
    once, recipe = recipe.epoch_tokens if recipe.epochs else 0, recipe.counted()
    host = skeleton(model, dtype=dtype, task=recipe.task)
    check_task(recipe, host)
    before, donor_bytes = host.num_parameters(), size(host.parameters())
    vocabulary = _vocabulary(host)
    setting = Setting(recipe.block_length, machine.processes, donor_bytes)
    steps = tuple(_step(step, host, model, setting, machine) for step in recipe.steps)
    trains = [step for step in steps if step.states is not None]
    return Plan(
        recipe=recipe.name,
        paper=recipe.paper,
        model=model,
        host=type(host).__name__,
        parameters=before,
        machine=machine,
        steps=steps,
        data=tuple(_sources(recipe, once, 2 if vocabulary <= SHORT_IDS else 4)),
        memory=_memory(trains or [Cost(states=ModelStates(donor_bytes))], machine.processes),
        needs=tuple(_need(way, trains, machine) for way in WAYS) if trains else (),
        checkpoints=CHECKPOINTS * max((s.states.checkpoint for s in trains if s.states), default=0),
        folder=size(host.parameters()),
    )


def _step(
    step: Step, model: PreTrainedModel, donor: str, setting: Setting, machine: Machine
) -> PlannedStep:
    with torch.device("meta"):  # routers are made without numbers, too
        step.rehearse(model, donor)
    cost = step.cost(model, setting)
    return PlannedStep(
        **vars(cost),
        verb=step.verb,
        tokens=step.tokens,
        parameters=model.num_parameters(),
        hours=machine.hours(cost.flops),
    )


def _vocabulary(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _sources(recipe: Recipe, once: int, each: int) -> Iterator[Source]:
    """`once`: tokens of one epoch, 0 where steps count tokens; `each`: bytes of one."""
    calibrate = [step.tokens for step in recipe.steps if not step.trains]
    wanted = max(once or recipe.train_tokens(), *calibrate, 0)
    mixed = mixture(recipe.data)
    whole = sum(weight for _, weight in mixed)
    for name, weight in mixed:
        tokens = round(wanted * weight / whole)
        found = parse_source(name)
        there = {"hub": None, "file": Path(found.name).exists()}.get(found.kind, True)
        stored = recipe.task == "lm" and found.kind != "self" and tokens > IN_MEMORY
        yield Source(name, found.kind, there, tokens, tokens * each if stored else 0)


def on_card(cost: Cost, way: Way, processes: int, *, recomputed: bool = False) -> float:
    """Bytes that a train step takes on each card: states, activations and logits."""
    assert cost.states is not None
    states = cost.states.per_process(way.stage, processes, cost.teacher, offloaded=way.offloaded)
    return states + (cost.recomputed if recomputed else cost.activations) + cost.logits


def _memory(costs: Sequence[Cost], processes: int) -> dict[str, dict[str, float]]:
    return {
        str(count): {
            name: max(on_card(one, way, count) for one in costs) for name, way in WAYS.items()
        }
        for count in sorted({*PROCESSES, processes})
    }


def _need(name: str, costs: Sequence[Cost], machine: Machine) -> Need:
    way, count = WAYS[name], machine.processes
    room = ROOM * gpu(machine.gpu)[1].memory
    as_is, again = (
        max(on_card(one, way, count, recomputed=recomputed) for one in costs)
        for recomputed in (False, True)
    )
    states = [(one, one.states) for one in costs if one.states is not None]
    sent = max(
        sent_bytes(each, way.stage, count, passes=one.passes, teacher=one.teacher)
        for one, each in states
    )
    host = max(
        each.per_host(way, count, machine.on_host, one.teacher, born=BORN) for one, each in states
    )
    return Need(
        way=name,
        gpu=as_is,
        gpu_recomputed=again,
        fits=as_is <= room,
        fits_recomputed=again <= room,
        host=host,
        sent=sent,
        sending=machine.sending(sent),
    )


BORN = True
"""Whether a stage 3 reads weights straight to its shards (`moe_tools.training.born_sharded`)."""
