"""Whole runs layer by layer: the folder, what is refused, and kill -9."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_tools.checkpoint.loading import load
from moe_tools.cli.main import main
from moe_tools.experts.experts import expert_ffns
from moe_tools.recipe import Recipe
from moe_tools.runs import stream as streaming
from moe_tools.runs.run import run
from tests.runs.test_run import FP32, ROOT, WORDS, metrics, recipe, snapshot, work
from tests.runs.test_stream import tensors

__all__ = ["recipe", "work"]
UNTRAINED = slice(0, 2)
"""Steps of the recipe that stream: split and attach, both on activations."""


@pytest.fixture(scope="module")
def streams(recipe: Recipe) -> Recipe:
    return replace(recipe, steps=recipe.steps[UNTRAINED])


@pytest.fixture(scope="module")
def whole(work: Path, streams: Recipe) -> Path:
    return run(streams, str(work / "donor"), work / "whole", keep_steps=True, **FP32)


def assert_same(whole: Path, streamed: Path) -> None:
    """Every file but the shards and the clocks."""
    a, b = tensors(whole), tensors(streamed)
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    names = {path.name for path in whole.iterdir() if path.is_file()}
    for name in names - {"model.safetensors", "metrics.json"}:
        assert (whole / name).read_bytes() == (streamed / name).read_bytes(), name
    one, other = metrics(whole), metrics(streamed)
    for step in (*one["steps"], *other["steps"]):
        del step["seconds"]
    assert one == other


def test_the_folder_is_the_same(work: Path, streams: Recipe, whole: Path, tmp_path: Path) -> None:
    out = run(streams, str(work / "donor"), tmp_path / "out", stream=True, **FP32)
    assert_same(whole, out)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(out).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
    assert not (out / "steps").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MoeToolsLlamaForCausalLM"]
    before = snapshot(out)
    run(streams, str(work / "donor"), out, stream=True, **FP32)
    run(streams, str(work / "donor"), out, stream=False, **FP32)
    assert snapshot(out) == before  # complete is complete, however it was made


def test_a_run_goes_on_in_memory_where_it_was_streamed(
    work: Path, streams: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a step that cannot be streamed follows those that are, with a word about it."""
    out = tmp_path / "out"
    memory = SimpleNamespace(available=1000)
    monkeypatch.setattr(streaming.psutil, "virtual_memory", lambda: memory)
    run(streams, str(work / "donor"), out, keep_steps=True, **FP32)
    assert_same(whole, out)
    assert len(list((out / "steps" / "0-split").glob("*.safetensors"))) == 3


def test_what_cannot_be_streamed_runs_as_ever(
    work: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = SimpleNamespace(available=1000)
    monkeypatch.setattr(streaming.psutil, "virtual_memory", lambda: memory)
    short = replace(recipe, steps=(*recipe.steps[UNTRAINED], replace(recipe.steps[3], tokens=64)))
    with caplog.at_level(logging.WARNING, logger="moe_tools"):
        out = run(short, str(work / "donor"), tmp_path / "out", **FP32)
    assert "step 2, train, needs it whole: its gradients" in caplog.text
    assert len(expert_ffns(load(out))) == 2


def test_a_mistake_is_known_before_the_first_file(
    work: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="step 2, train, cannot run layer by layer"):
        run(recipe, str(work / "donor"), tmp_path / "out", stream=True, **FP32)
    large = replace(recipe.steps[0], expert_size=1000)
    with pytest.raises(ValueError, match="1000"):
        run(replace(recipe, steps=(large,)), str(work / "donor"), tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text(WORDS[0])
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        run(
            replace(recipe, steps=recipe.steps[UNTRAINED]),
            str(work / "donor"),
            tmp_path / "out",
            stream=True,
        )
    assert snapshot(tmp_path) == before


def test_the_command(
    work: Path,
    recipe: Recipe,
    streams: Recipe,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No table, which needs the whole model; a recipe that trains is one line and exit code 2."""
    for name, made in (("streams", streams), ("trains", recipe)):
        (tmp_path / f"{name}.yaml").write_text(made.to_yaml())
    given = ["--stream", "--dtype", "fp32", "--device", "cpu", "--model", str(work / "donor")]
    for name, code in (("streams", 0), ("trains", 2)):
        file, out = str(tmp_path / f"{name}.yaml"), str(tmp_path / name)
        assert main(["convert", *given, "--recipe", file, "--output", out]) == code
    assert_same(whole, tmp_path / "streams")
    assert not (tmp_path / "trains").exists()
    said = capsys.readouterr()
    assert "perplexity" not in said.out
    assert "step 2, train, cannot run layer by layer" in said.err.splitlines()[-1]


PROGRAM = """
import os, signal, sys, torch
from moe_tools.runs.run import run
from moe_tools.recipe import read_recipe
recipe, donor, out, event, path = sys.argv[1:]

def die(name, args):
    if name == event and str(args[0]).endswith(path):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
run(read_recipe(recipe), donor, out, dtype=torch.float32, stream=True)
"""


def test_kill_9_inside_a_step(streams: Recipe, work: Path, tmp_path: Path, whole: Path) -> None:
    """In the second layer of the second step; then with all layers done, before the folder is."""
    out, file = tmp_path / "out", tmp_path / "recipe.yaml"
    file.write_text(streams.to_yaml())
    unfinished, times = out / "steps" / "1-attach.work" / "layers", []
    for event, path in (
        ("open", "1-attach.work/layers/.1.json.partial"),
        ("os.mkdir", ".1-attach.partial"),
    ):
        command = [sys.executable, "-c", PROGRAM, str(file), str(work / "donor"), str(out)]
        process = subprocess.run(
            [*command, event, path], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        times.append((unfinished / "0.safetensors").stat().st_mtime_ns)
        assert not (out / "metrics.json").exists()
    assert times[0] == times[1]
    assert (unfinished / "1.safetensors").is_file()
    run(streams, str(work / "donor"), out, stream=True, **FP32)
    assert_same(whole, out)
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
