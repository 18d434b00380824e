"""What transformers' Trainer is told: the one device of a run, and how batches get there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from moe_tools import processes
from moe_tools.data import Batch
from moe_tools.recipe import Train
from moe_tools.steps.launch import Launch
from moe_tools.training.arguments import BatchItems, batch_of, training_arguments
from moe_tools.training.checkpointing import NAME

STEP = Train(tokens=1, batch_size=3, accumulate=2)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """This process seems to see two GPUs; yields which of them it makes its own."""
    chosen: list[torch.device] = [torch.device("cuda:0")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1].index)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: chosen.append(torch.device(place)))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield chosen
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(device: str, folder: Path, step: Train = STEP) -> TrainingArguments:
    return training_arguments(step, folder, 7, 0, Launch(device), bf16=False)


@pytest.mark.parametrize(
    ("told", "used"), [("cuda:1", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda", "cuda:0")]
)
def test_a_run_uses_the_device_that_it_was_told_and_no_other(
    told: str, used: str, tmp_path: Path, two_gpus: list[torch.device]
) -> None:
    """transformers alone takes both: a batch of two items, and a copy of the model on each."""
    found = arguments(told, tmp_path)
    assert found.device == torch.device(used)
    assert two_gpus[-1] == torch.device(used)  # kernels start on the current device
    assert found.n_gpu == 1
    assert found.parallel_mode == ParallelMode.NOT_PARALLEL
    assert found.train_batch_size == 1


def test_a_run_on_the_cpu_uses_no_gpu(tmp_path: Path, two_gpus: list[torch.device]) -> None:
    found = arguments("cpu", tmp_path)
    assert (found.device, found.n_gpu) == (torch.device("cpu"), 0)
    assert found.train_batch_size == 1
    assert two_gpus == [torch.device("cuda:0")]


@pytest.mark.parametrize(("device", "pinned"), [("cuda:1", True), ("cpu", False)])
def test_a_batch_goes_to_a_gpu_without_a_wait(
    device: str, pinned: bool, tmp_path: Path, two_gpus: list[torch.device]
) -> None:
    """From memory that can move, the copy would wait for all that the GPU has to do before."""
    found = arguments(device, tmp_path)
    assert found.dataloader_pin_memory == pinned
    assert found.accelerator_config.non_blocking == pinned


def test_the_loss_of_a_pass_is_not_read(tmp_path: Path) -> None:
    assert not arguments("cpu", tmp_path).logging_nan_inf_filter


@pytest.mark.parametrize(("device", "index"), [("cuda:1", "1"), ("cuda", "0"), ("cpu", "0")])
def test_deepspeed_in_one_process_is_told_the_device_too(
    device: str, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the GPU of the local rank."""
    seen: list[str] = []
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda *_, **__: seen.append(os.environ["LOCAL_RANK"]),
    )
    with processes.process_group(device, alone=True):
        pass
    assert seen == [index]
    assert "LOCAL_RANK" not in os.environ


def test_what_the_recipe_says_is_handed_on(tmp_path: Path) -> None:
    found = arguments("cpu", tmp_path, replace(STEP, checkpointing=True, checkpoint_every=9))
    assert found.gradient_accumulation_steps == 2 and found.max_steps == 7
    assert found.save_steps == 9 and getattr(found, NAME)


def test_scores_reach_the_model_as_they_are() -> None:
    """Under DeepSpeed, transformers rounds floats to bf16 on their way, and nothing else."""
    scores_B = torch.tensor([3.8, -0.1, 1234.567])
    batch = Batch(torch.ones(3, 2, dtype=torch.long), scores_B)
    (item,) = [BatchItems([batch])[0]]
    assert not any(tensor.is_floating_point() for tensor in item.values())
    assert scores_B.bfloat16().float().tolist() != scores_B.tolist()
    found = batch_of(item).labels_B
    assert found is not None and torch.equal(found, scores_B)
