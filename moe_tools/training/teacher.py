"""Where the teacher of a train step is while the student learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from moe_tools import processes
from moe_tools.data import Batch
from moe_tools.hosts.moe_host import unfuse_experts
from moe_tools.steps.launch import Launch
from moe_tools.training import born_sharded, zero
from moe_tools.training.cached_teacher import CachedTeacher
from moe_tools.training.losses import seen_kinds

if TYPE_CHECKING:
    from moe_tools.training.train import Train


@dataclass(frozen=True)
class Donor:
    """A teacher that is not loaded yet."""

    load: Callable[[str], PreTrainedModel]
    """Loads it, given a device; meta: without its weights."""
    source: str
    """Folder, hub id or GGUF file."""


@dataclass(frozen=True)
class Teaching:
    """What a train step learns from."""

    model: PreTrainedModel | None = None
    cached: CachedTeacher | None = None


def check_teacher(step: Train, launch: Launch, source: str | None) -> None:
    """Checks, before anything is loaded, that the teacher can be where a step wants it.

    Args:
        step: the train step.
        launch: of the step.
        source: of the teacher; None: it is in memory.

    Raises:
        ValueError: shards without ZeRO-3, or of a model that has to be read as a whole.
    """
    if step.teacher != "sharded" or not step.needs_donor():
        return
    if launch.zero_stage != 3:
        raise ValueError(
            "train: teacher sharded needs ZeRO-3 (--deepspeed zero3): without it use whole, "
            "offloaded or cached"
        )
    reason = None if source is None else born_sharded.why_whole(source, launch)
    if reason is not None:
        raise ValueError(f"train: teacher sharded is not possible: {reason}: use whole or cached")


@contextmanager
def taught(
    step: Train,
    donor: PreTrainedModel | Donor | None,
    batches: Sequence[Batch],
    pinned: str,
    work: Path,
    launch: Launch,
) -> Iterator[Teaching]:
    """Lends what a step learns from, and undoes at its end what that changed outside of it.

    Args:
        step: with the place of the teacher.
        donor: it, loaded or not; None: no loss needs one.
        batches: of the step.
        pinned: their fingerprint.
        work: folder of the step, for what is cached.
        launch: of the step.

    Raises:
        ValueError: as `check_teacher`, or the disk refuses what is cached.
    """
    if donor is None or not step.needs_donor():
        yield Teaching()
        return
    given = donor
    source = given.source if isinstance(given, Donor) else None

    def load(device: str) -> PreTrainedModel:
        return given.load(device) if isinstance(given, Donor) else given

    match step.teacher:
        case "whole":
            yield Teaching(load(launch.device))
        case "offloaded":
            yield Teaching(offloaded(load("cpu"), _device(launch), step))
        case "cached":
            folder = work / f"teacher-{pinned}-{step.teacher_top_k}"
            cached, k = CachedTeacher(folder, len(batches)), step.teacher_top_k
            processes.on_first(lambda: cached.write(lambda: load(launch.device), batches, k))
            yield Teaching(cached=cached)
        case "sharded":
            check_teacher(step, launch, source)
            with zero.released():
                model = load("cpu" if source is None else "meta")
                if source is not None:
                    born_sharded.fill(model, source, launch)
                yield Teaching(_gathering(model, step, launch))


def offloaded(donor: PreTrainedModel, device: torch.device, step: Train) -> PreTrainedModel:
    """Keeps a model in the memory of the CPU, and computes on a device; on a CPU it is whole."""
    if device.type == "cpu":
        return donor
    if seen_kinds(step.losses):
        unfuse_experts(donor)  # before what is to be watched has no weights
    return lent_by_cpu(donor, device)


def lent_by_cpu(donor: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Lets every module of a model get its weights from the CPU when it runs on a device."""
    from accelerate import cpu_offload

    cpu_offload(donor.to("cpu"), execution_device=device)  # type: ignore[arg-type]
    return donor


def _device(launch: Launch) -> torch.device:
    """Where this process computes."""
    told = torch.device(launch.device)
    if told.type == "cpu" or told.index is not None or processes.count() == 1:
        return told
    return torch.device(told.type, processes.local_rank())


def _gathering(model: PreTrainedModel, step: Train, launch: Launch) -> PreTrainedModel:
    """Lets DeepSpeed gather the shares of a model for each module that runs, without training."""
    import deepspeed

    assert launch.deepspeed is not None
    if seen_kinds(step.losses):
        unfuse_experts(model)
    given = launch.deepspeed["zero_optimization"]
    kept = ("offload_param", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            **{key: given[key] for key in kept if given.get(key, "auto") != "auto"},
        },
        "bf16": {"enabled": model.dtype == torch.bfloat16},
    }
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    assert engine.module is model
    return model.eval()
