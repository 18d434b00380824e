"""What transformers' Trainer is told about a train step. Letters: B blocks of a batch, T tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainingArguments

from moe_tools.data import Batch
from moe_tools.data.batching import Batches
from moe_tools.names import IGNORE
from moe_tools.steps.launch import Launch
from moe_tools.training import checkpointing

if TYPE_CHECKING:
    from moe_tools.training.cached_teacher import CachedTeacher
    from moe_tools.training.train import Train

CLIPPING = 1.0
"""Largest norm of a gradient, of every train step."""
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
"""Where transformers looks for the folder."""


class BatchItems(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Holds whole batches as items, in the order and the groups that the data layer made."""

    def __init__(self, batches: Sequence[Batch], cached: CachedTeacher | None = None) -> None:
        """Checks the labels, here where they are in the host's memory.

        Args:
            batches: in order. Those of a long text are made when they are read; their rows all have
                a labelled token (`moe_tools.data.cutter`).
            cached: what a teacher says of each of them, which then goes with it.

        Raises:
            ValueError: no token of a batch is labelled.
        """
        known = [] if isinstance(batches, Batches) and batches.rows.length > 1 else batches
        for index, batch in enumerate(known):
            labels = batch.next_labels_BT() if batch.labels_B is None else batch.labels_B
            if not labels.is_floating_point() and not (labels != IGNORE).any():
                raise ValueError(f"batch {index} has no labelled token: {_why(batch)}")
        self.batches, self.cached = batches, cached

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The tensors of a batch by their names in `Batch`; those that are None are left out."""
        batch = self.batches[index]
        fields = {name: one for name, one in batch._asdict().items() if one is not None}
        if batch.labels_B is not None and batch.labels_B.is_floating_point():
            fields[SCORES] = fields.pop("labels_B").float().view(torch.int32)
        said = {} if self.cached is None else self.cached[index]
        return {NAMES.get(name, name): one for name, one in fields.items()} | said


NAMES = {"ids_BT": "input_ids"}
"""What transformers' Trainer calls a field of `Batch`: it counts the tokens of what it knows."""


SCORES = "scores_B"
"""Labels that are floats, as the whole numbers of their bits: under DeepSpeed, transformers rounds
every float that it is given to bf16."""


def batch_of(item: dict[str, Tensor]) -> Batch:
    """The batch of an item, wherever its tensors are by now."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    said = ("teacher_ids", "teacher_logp")  # `CachedTeacher`
    fields = {ours.get(name, name): one for name, one in item.items() if name not in said}
    if SCORES in fields:
        fields["labels_B"] = fields.pop(SCORES).view(torch.float32)
    return Batch(**fields)


def _why(batch: Batch) -> str:
    if batch.labels_B is not None:
        return f"all its labels are {IGNORE}: leave such rows out"
    if batch.ids_BT.shape[1] < 2:
        return "its blocks have 1 token, and none follows it: give a longer block_length"
    return "it has no token to learn: leave such rows out"


def only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the only item of a list."""
    (item,) = items
    return item


@dataclass
class OneDeviceArguments(TrainingArguments):
    """Arguments of a Trainer that uses one device, where transformers takes every GPU it sees.

    It would put a copy of the model on each of them, and hand out as many batches at once.
    """

    told: str = "cpu"
    """The device. Of several processes each has the GPU of its local rank, as transformers does."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        device: torch.device = super()._setup_devices
        told = torch.device(self.told)
        if self._n_gpu == 0 or self.distributed_state.distributed_type != DistributedType.NO:
            return device
        self._n_gpu = 1
        if told.index is not None:
            torch.cuda.set_device(told)
            device = told
        return device


def training_arguments(
    step: Train, work: Path, steps: int, seed: int, launch: Launch, *, bf16: bool
) -> TrainingArguments:
    """Returns the Trainer's arguments; `bf16` says whether the weights are in bf16."""
    on_gpu = torch.device(launch.device).type != "cpu"
    arguments: dict[str, Any] = {
        "told": launch.device,
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": 1,  # an item is a batch
        "gradient_accumulation_steps": step.accumulate,
        "max_grad_norm": CLIPPING,
        "save_strategy": "steps",
        "save_steps": step.checkpoint_every,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": list(launch.report_to),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it reads every loss; we stop at one that is not finite
        "use_cpu": not on_gpu,
        "seed": seed,
        # Otherwise each batch waits until the GPU has done all that it was given before.
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},
        checkpointing.NAME: step.checkpointing,
        # The other kind runs the first forward pass without a graph: losses collected from modules
        # would lose their gradient, silently.
        f"{checkpointing.NAME}_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
    }
    if launch.deepspeed is not None:
        config = _copied(dict(launch.deepspeed))  # transformers fills in what is `auto`
        if bf16 and step.accumulate > 1:  # a bf16 sum loses what is smaller than 1/256 of it
            config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
        arguments |= {"deepspeed": config, "bf16": bf16}
    return OneDeviceArguments(**arguments)


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextmanager
def tensorboard_in(folder: Path | None) -> Iterator[None]:
    """Sends TensorBoard's files to a folder while it lasts."""
    before = os.environ.get(TENSORBOARD)
    if folder is not None:
        os.environ[TENSORBOARD] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TENSORBOARD, None)
        else:
            os.environ[TENSORBOARD] = before
