"""A run on a disk that is full again and again: real refusals of the kernel, one line each."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_tools.disk import CannotWrite
from moe_tools.recipe import Attach, Fit, Recipe, Split
from moe_tools.runs.run import run
from tests.killed import Killed
from tests.runs.test_run import (
    EXPERT_SIZE,
    FP32,
    HARD,
    LENGTH,
    die_in,
    history,
    recipe,
    same_weights,
    work,
)

__all__ = ["recipe", "work"]  # fixtures

FILES = ("config.json", "generation_config.json", "model.safetensors", "README.md")
FILES += ("tokenizer.json", "tokenizer_config.json")
ROOM = range(32, 4096, 96)
"""KiB that a disk has, one after the other."""


@pytest.fixture
def every_writer(recipe: Recipe) -> Recipe:
    """What writes files: steps, activations, routers, checkpoints with their optimizer."""
    attach = Attach(router="mlp", selector={"kind": "topk", "share": 0.5}, start="open")
    trained = replace(HARD, tokens=5 * 4 * LENGTH, target_sparsity=None)
    steps = (Split(EXPERT_SIZE, tokens=256), attach, Fit(tokens=256, epochs=1), trained)
    return replace(recipe, steps=steps)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with hardly any room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM[0]}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nobody but root, outside of most containers, has disks to fill")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def check_line(error: CannotWrite) -> None:
    line = str(error)
    assert "\n" not in line and "cannot be written" in line
    assert line.endswith(("what was complete is kept", "the same command goes on from it"))


def test_a_disk_that_is_full_again_and_again(
    every_writer: Recipe, work: Path, tmp_path: Path, disk: Path
) -> None:
    """Each time there is a little more room, the run goes on: with the same end as in one go."""
    out, refused = disk / "out", []
    for size in ROOM:
        resize(disk, size)
        try:
            run(every_writer, str(work / "donor"), out, **FP32)
            break
        except CannotWrite as error:
            check_line(error)
            refused.append(str(error).replace(str(disk), ""))
            assert not [path for path in disk.rglob("*") if path.name.startswith(".")]
            assert not (out / "metrics.json").exists()
    places = {line.split(" cannot be written")[0] for line in refused}
    assert any("No space left on device (0.00 GiB are free)" in line for line in refused)
    assert len(places) > 3 and "/out/steps/0-split" in places, places
    undisturbed = run(every_writer, str(work / "donor"), tmp_path / "undisturbed", **FP32)
    assert same_weights(out, undisturbed)
    assert history(out) == history(undisturbed)


def test_a_disk_that_is_full_at_the_end_of_a_run(
    every_writer: Recipe, work: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page: the lock, the card, the metrics."""
    out, short = disk / "out", replace(every_writer, steps=every_writer.steps[:1])
    resize(disk, 4096)
    with monkeypatch.context() as patch:
        die_in(patch, "link", lambda source, _: source.name == "config.json")
        with pytest.raises(Killed):
            run(short, str(work / "donor"), out, **FP32)
    used = int(
        subprocess.run(["du", "-sk", disk], capture_output=True, check=True).stdout.split()[0]
    )
    places = []
    for size in range(used, used + 100, 4):
        resize(disk, size)
        try:
            run(short, str(work / "donor"), out, **FP32)
            break
        except CannotWrite as error:
            check_line(error)
            places.append(str(error).split(" cannot be written")[0])
    assert {str(out), str(out / "metrics.json")} <= set(places), places
    assert {path.name for path in out.iterdir()} == {*FILES, "recipe.yaml", "metrics.json"}


@pytest.mark.parametrize("kib", [8, 24, 64])
def test_files_that_may_not_be_long(
    kib: int, every_writer: Recipe, work: Path, tmp_path: Path
) -> None:
    """As under `ulimit -f`, for whoever is not root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, before[1]))
    try:
        with pytest.raises(CannotWrite) as said:
            run(every_writer, str(work / "donor"), tmp_path / "out", **FP32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_line(said.value)
    run(every_writer, str(work / "donor"), tmp_path / "out", **FP32)
