"""Checkpoints of a train step, and what recomputing layers does to its gradients."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.experts.experts import expert_ffns
from moe_tools.recipe import Train
from moe_tools.steps.launch import Launch
from moe_tools.training import checkpoints
from moe_tools.training.checkpoints import newest_checkpoint
from moe_tools.training.train import train
from tests.families import is_router
from tests.killed import Killed, kill_at
from tests.training.test_train import SOFT, converted, equal, text

STEP = replace(SOFT, checkpoint_every=2)


# --- recomputing layers


def gradients(step: Train, folder: Path) -> tuple[dict[str, Tensor], int]:
    """Of every parameter in one step, and how often an FFN ran."""
    model = converted()
    found: dict[str, Tensor] = {}
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    expert_ffns(model)[0].register_forward_pre_hook(count)
    for name, param in model.named_parameters():
        param.register_hook(lambda grad, name=name: found.__setitem__(name, grad.clone()))
    train(model, step, text(4), folder)
    return found, passes


@pytest.mark.parametrize("mode", ["soft", "straight"])
@pytest.mark.parametrize(
    "losses",
    [
        {"lm": 1.0, "efficiency": 0.5, "separability": 0.5},
        {"lm": 0.0, "efficiency": 1.0},
        {"lm": 0.0, "separability": 1.0},
        {"lm": 0.0, "l1": 1.0},
    ],
    ids=["all", "efficiency", "separability", "l1"],
)
def test_recomputed_layers_give_the_same_gradients(
    mode: Any, losses: dict[str, Any], tmp_path: Path
) -> None:
    step = replace(SOFT, mode=mode, losses=losses)
    plain, once = gradients(step, tmp_path / "plain")
    again, twice = gradients(replace(step, checkpointing=True), tmp_path / "again")
    assert (once, twice) == (1, 2)
    assert plain.keys() == again.keys()
    routers = [name for name in plain if is_router(name)]
    if "l1" not in losses:
        assert len(routers) == 4 and all(plain[name].abs().max() > 0 for name in routers)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


# --- a checkpoint that cannot be written, or not be taken up


def full_disk(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The file system refuses the weights of one checkpoint."""
    save_weights = checkpoints.save_weights

    def refuse(model: Any, file: Path) -> None:
        if f"checkpoint-{at}" in str(file):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_weights(model, file)

    monkeypatch.setattr(checkpoints, "save_weights", refuse)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = converted()
    train(through, STEP, text(32), tmp_path / "through")
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        full_disk(patch, at=4)
        with pytest.raises(
            ValueError, match=r"step 4 cannot be written to .*No space left"
        ) as said:
            train(converted(), STEP, text(32), work)
    assert "\n" not in str(said.value) and "the last good one is kept" in str(said.value)
    assert [path.name for path in work.iterdir()] == ["checkpoint-2"]
    resumed = converted()
    train(resumed, STEP, text(32), work)
    assert equal(resumed, through)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"processes": 4, "zero": 3}, "4 processes under ZeRO-3, but this run has 1 process with"),
        ({"processes": 1, "zero": 0}, "1 process under ZeRO-0, but this run has 1 process without"),
        (
            {"processes": 4, "zero": None, "accumulate": 2},
            "4 processes without DeepSpeed, 8 passes an optimizer step .* but this run has 1: set",
        ),
    ],
)
def test_the_checkpoint_of_other_processes_is_refused(
    written: dict[str, int | None], message: str, tmp_path: Path
) -> None:
    killed = converted()
    kill_at(killed, 4)
    with pytest.raises(Killed):
        train(killed, STEP, text(32), tmp_path)
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"][checkpoints.LAYOUT] == {
        "processes": 1,
        "zero": None,
        "accumulate": 1,
    }
    state["stateful_callbacks"][checkpoints.LAYOUT] = written
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        train(converted(), STEP, text(32), tmp_path)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_the_checkpoint_of_another_text_is_refused(tmp_path: Path) -> None:
    killed, other = converted(), text(32)
    kill_at(killed, 4)
    with pytest.raises(Killed):
        train(killed, STEP, text(32), tmp_path)
    other[-1, -1] += 1  # one token, which the checkpoint has not even seen
    said = (
        rf"{tmp_path}/checkpoint-2 was begun on the text (\w{{16}}), but this run reads (\w{{16}})"
    )
    with pytest.raises(ValueError, match=said) as refused:
        train(converted(), STEP, other, tmp_path)
    assert "\n" not in str(refused.value) and "choose another --output" in str(refused.value)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    through, resumed = converted(), converted()
    train(through, STEP, text(32), tmp_path / "through")
    train(resumed, STEP, text(32), tmp_path)
    assert equal(resumed, through)


def test_the_checkpoint_of_an_older_version_names_no_text(tmp_path: Path) -> None:
    killed = converted()
    kill_at(killed, 4)
    with pytest.raises(Killed):
        train(killed, STEP, text(32), tmp_path)
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    assert len(state["stateful_callbacks"].pop(checkpoints.TEXT)) == 16
    file.write_text(json.dumps(state))
    train(converted(), STEP, text(32), tmp_path)


def test_a_checkpoint_whose_last_file_is_cut_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no room on the disk that was too small for it."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoints.CheckpointingTrainer._save_rng_state

    def and_no_more(self: Any, folder: str) -> None:
        save(self, folder)
        if folder.endswith("-4"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, limit[1]))

    monkeypatch.setattr(checkpoints.CheckpointingTrainer, "_save_rng_state", and_no_more)
    try:
        with pytest.raises(ValueError, match=r"step 4 cannot be written .*File too large"):
            train(converted(), STEP, text(32), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_tensorboard_shows_the_losses(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    launch = Launch(report_to=("tensorboard",), logs=tmp_path / "logs")
    measured = train(converted(), STEP, text(40), tmp_path / "work", launch=launch)
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    for name in ("lm", "efficiency", "sparsity"):
        (found,) = (t for t in events.Tags()["scalars"] if t.split("/")[-1] == name)
        assert events.Scalars(found)[-1].value == pytest.approx(measured[name], rel=1e-5)
