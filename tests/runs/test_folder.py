"""Whose a run's folder is, and what the run was begun on: a second run, another text or donor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moe_tools.lock import held
from moe_tools.recipe import Recipe, Split
from moe_tools.runs import run as pipeline
from moe_tools.runs.folder import Pins, RunFolder
from moe_tools.runs.run import run
from tests.killed import Killed
from tests.runs.test_run import (
    EXPERT_SIZE,
    FP32,
    LENGTH,
    PROGRAM,
    ROOT,
    die_in,
    metrics,
    recipe,
    same_weights,
    snapshot,
    sparse,
    work,
)

__all__ = ["recipe", "work"]  # fixtures

FP32_ = FP32["dtype"]


@pytest.fixture
def donor(work: Path, tmp_path: Path) -> Path:
    """A donor that may be changed."""
    return shutil.copytree(work / "donor", tmp_path / "donor")


@pytest.fixture
def text(work: Path, tmp_path: Path) -> Path:
    """A text that may be changed."""
    return Path(shutil.copy(work / "text.txt", tmp_path / "text.txt"))


@pytest.fixture
def short(recipe: Recipe, text: Path) -> Recipe:
    """Three steps in a moment."""
    steps = (Split(EXPERT_SIZE), *sparse(4 * LENGTH, 4 * LENGTH))
    return replace(recipe, data=str(text), steps=steps)


def retrain(donor: Path, name: str) -> None:
    """Changes one tensor of a donor, as training would, and the size of no file."""
    file = donor / "model.safetensors"
    state = load_file(file)
    state[name] = state[name] + 1e-3
    save_file(state, file, metadata={"format": "pt"})


def kill_before(
    index: int, monkeypatch: pytest.MonkeyPatch, short: Recipe, donor: Path, out: Path, **more: Any
) -> None:
    """A run that dies when it is about to write a step."""
    with monkeypatch.context() as patch:
        die_in(patch, "save", lambda _, folder, __: f"{index}-" in str(folder))
        with pytest.raises(Killed):
            run(short, str(donor), out, **FP32, **more)


# --- two runs in one folder

SLOW = """
import sys, torch
from moe_tools.recipe import read_recipe
from moe_tools.runs import run as pipeline
from moe_tools.runs.folder import Pins, RunFolder

def wait(*args):
    print("in", flush=True)
    sys.stdin.read()
    return save(*args)

save, pipeline.save = pipeline.save, wait
recipe, donor, out = sys.argv[1:]
pipeline.run(read_recipe(recipe), donor, out, dtype=torch.float32)
"""


def test_a_second_run_is_refused_while_the_first_goes_on(
    short: Recipe, donor: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "short.yaml"
    file.write_text(short.to_yaml())
    command = [sys.executable, "-c", SLOW, str(file), str(donor), str(out)]
    pipe = subprocess.PIPE
    first = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    before = snapshot(out)
    for second in (short, replace(short, seed=1)):
        with pytest.raises(ValueError, match=f"{out} is being written by process {first.pid} on "):
            run(second, str(donor), out, **FP32)
    assert {name for name in snapshot(out) if name != ".lock"} == before.keys() - {".lock"}
    first.send_signal(signal.SIGKILL)
    first.wait()
    run(short, str(donor), out, **FP32)  # its lock ended with it
    assert metrics(out)["recipe"] == short.name
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_a_control_that_another_run_writes_is_left_to_it(
    short: Recipe, donor: Path, tmp_path: Path
) -> None:
    out = run(short, str(donor), tmp_path / "out", keep_steps=True, **FP32)
    with (
        held(out / "control"),
        pytest.raises(ValueError, match="control is being written by process"),
    ):
        run(short, str(donor), out, control=True, **FP32)
    run(short, str(donor), out, control=True, **FP32)
    assert (out / "control" / "metrics.json").is_file()


def test_the_command_says_it_in_one_line(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--model", str(work / "donor"), "--output", str(out), "--device", "cpu")
    options += ("--data", str(work / "text.txt"), "--block-length", "16", "--tokens", "64")
    command = [sys.executable, "-m", "moe_tools.cli.main", "train", "lte", *options]
    with held(out):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(f"moe-tools: {out} is being written by process {os.getpid()} on")
    assert done.stderr.count("\n") == 1


def test_a_complete_run_that_nobody_can_write_is_complete(
    short: Recipe, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(short, str(donor), tmp_path / "out", **FP32)
    before = snapshot(out)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root is let in everywhere
    assert run(short, str(donor), out, **FP32) == out
    assert snapshot(out) == before


@pytest.mark.parametrize("inside", ["out", "a/b/out"])
def test_a_donor_gets_no_output_into_it(inside: str, short: Recipe, donor: Path) -> None:
    before = snapshot(donor)
    with pytest.raises(ValueError, match=f"is inside the donor {donor}, which must stay"):
        run(short, str(donor), donor / inside, **FP32)
    with pytest.raises(ValueError, match="exists and is not empty: choose another --output"):
        run(short, str(donor), donor, **FP32)
    assert snapshot(donor) == before


# --- what a run was begun on


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_donor_that_changed_is_not_gone_on_with(
    name: str,
    complete: bool,
    short: Recipe,
    donor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    kill_before(1, monkeypatch, short, donor, out)
    if complete:
        run(short, str(donor), out, **FP32)
    before = snapshot(out)
    kept = shutil.copytree(donor, tmp_path / "kept")
    retrain(donor, name)
    said = rf"{out} was begun on the weights [0-9a-f]{{16}} of {donor}, and they are [0-9a-f]{{16}}"
    with pytest.raises(ValueError, match=said):
        run(short, str(donor), out, **FP32)
    assert snapshot(out) == before
    shutil.rmtree(donor)
    kept.rename(donor)  # other inodes, the same model
    (donor / "notes.txt").write_text("no part of the model")
    run(short, str(donor), out, **FP32)


def test_a_donor_that_changes_between_two_steps_is_seen(
    short: Recipe, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = pipeline.save

    def and_change(*args: Any) -> None:
        save(*args)
        retrain(donor, "model.norm.weight")

    monkeypatch.setattr(pipeline, "save", and_change)
    with pytest.raises(ValueError, match="was begun on the weights"):
        run(short, str(donor), tmp_path / "out", **FP32)
    assert {path.name for path in (tmp_path / "out" / "steps").iterdir()} == {"0-split"}


def test_a_folder_of_an_older_version_goes_on(
    short: Recipe, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names no weights; of a version before that, no text either, which was refused then too."""
    out = tmp_path / "out"
    kill_before(2, monkeypatch, short, donor, out)
    first, second, rest = (out / "recipe.yaml").read_text().split("\n", 2)
    assert first.startswith("# text: ") and second.startswith("# weights: ")
    (out / "recipe.yaml").write_text(f"{first}\n{rest}")
    run(short, str(donor), out, **FP32)
    assert same_weights(out, run(short, str(donor), tmp_path / "new", **FP32))


@pytest.mark.parametrize(("processes", "accumulate", "goes_on"), [(2, 2, True), (4, 2, False)])
def test_other_processes_go_on_with_as_many_passes_together(
    processes: int,
    accumulate: int,
    goes_on: bool,
    short: Recipe,
    donor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recipe then says another `accumulate`; four passes in all are four, however divided."""

    def folder(passes: int) -> RunFolder:
        steps = [replace(s, accumulate=passes) if s.trains else s for s in short.steps]
        return RunFolder(tmp_path / "out", replace(short, steps=tuple(steps)), str(donor), FP32_)

    def pins() -> Pins:
        return Pins("a text", "some weights")

    assert folder(4).claim(lambda: None, pins)
    assert folder(4).read_marker() == (pins(), folder(4).identity)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if goes_on:
        assert folder(accumulate).claim(lambda: None, pins)
    else:
        with pytest.raises(ValueError, match="holds another run"):
            folder(accumulate).claim(lambda: None, pins)


def test_a_run_of_two_processes_says_so(
    short: Recipe, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "out", short, str(donor), FP32_)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert folder.claim(lambda: None, lambda: Pins("a text"))
    assert folder.read_marker() == (Pins("a text"), folder.identity)
    monkeypatch.delenv("WORLD_SIZE")
    steps = [replace(s, accumulate=2) if s.trains else s for s in short.steps]
    alone = replace(folder, recipe=replace(short, steps=tuple(steps)))
    assert alone.claim(lambda: None, lambda: Pins("a text"))


@pytest.mark.parametrize("change", ["text", "donor"])
def test_a_control_on_something_else_is_refused(
    change: str, short: Recipe, donor: Path, text: Path, tmp_path: Path
) -> None:
    """It would be set beside the run as if it had seen the same."""
    out = run(short, str(donor), tmp_path / "out", keep_steps=True, **FP32)
    if change == "text":
        text.write_text(text.read_text()[::-1])
    else:
        retrain(donor, "model.norm.weight")
    with pytest.raises(ValueError, match=f"{out} was begun on the"):
        run(short, str(donor), tmp_path / "like", like=out, **FP32)
    assert not (tmp_path / "like").exists()


def test_a_text_that_changes_while_the_run_goes_on_changes_nothing(
    short: Recipe, donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read once; only a control, which reads it again, is refused."""
    undisturbed = run(short, str(donor), tmp_path / "undisturbed", **FP32)
    save = pipeline.save

    def and_change(*args: Any) -> None:
        save(*args)
        text.write_text(text.read_text()[::-1])

    monkeypatch.setattr(pipeline, "save", and_change)
    with pytest.raises(ValueError, match="out was begun on the text"):
        run(short, str(donor), tmp_path / "out", control=True, **FP32)
    kept = tmp_path / "out" / "steps" / "2-train"
    assert same_weights(kept, undisturbed)
    assert not (tmp_path / "out" / "control").exists()


# --- the end of a run


def test_metrics_are_the_last_file_of_all(
    short: Recipe, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        die_in(patch, "new_file", lambda path: path.name == "metrics.json")
        with pytest.raises(Killed):
            run(short, str(donor), out, **FP32)
    assert f"Trained on {8 * LENGTH} tokens" in (out / "README.md").read_text()
    card = (out / "README.md").read_text()
    run(short, str(donor), out, **FP32)
    assert (out / "README.md").read_text() == card


def test_steps_that_were_being_dropped_are_no_steps(
    short: Recipe, donor: Path, tmp_path: Path
) -> None:
    """Killed there, the run is complete; nobody adopts a step of which files are missing."""
    out, file = tmp_path / "out", tmp_path / "short.yaml"
    file.write_text(short.to_yaml())
    given = [str(file), str(donor), str(out), "os.remove", "tokenizer_config.json"]
    process = subprocess.run([sys.executable, "-c", PROGRAM, *given], cwd=ROOT, timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert (out / "metrics.json").is_file() and (out / ".steps.partial").is_dir()
    assert not (out / "steps").exists()
    like = run(short, str(donor), tmp_path / "like", like=out, **FP32)
    assert same_weights(like, out)
    run(short, str(donor), out, **FP32)
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
