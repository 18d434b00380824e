"""`moe-tools train` in one process: what it writes, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_tools.checkpoint.saving import save
from moe_tools.recipe import read_recipe
from tests.cli.test_convert import RECIPE
from tests.families import build
from tests.tiny import Run, build_tokenizer, passages

SIZES = ("--dtype", "fp32", "--device", "cpu", "--block-length", "16")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    save(build("llama"), folder / "donor", build_tokenizer())
    drawn = passages(200)
    for name, part in (("one", drawn[:100]), ("two", drawn[100:])):
        lines = [json.dumps({"text": passage}) for passage in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "empty.jsonl").write_text("")
    (folder / "other.jsonl").write_text(json.dumps({"id": "x", "body": "y"}))
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "wild.yaml").write_text(RECIPE.replace("1e-3", "1e30"))
    (folder / "batch.json").write_text(json.dumps({"train_batch_size": 7}))
    (folder / "adam.json").write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    return folder


@pytest.fixture
def train(run: Run) -> Run:
    """`moe-tools train` with a good command line, and what is changed in it."""

    def call(
        *more: str, recipe: str = "mine.yaml", output: str = "new", data: str = "one.jsonl"
    ) -> tuple[int, str, str]:
        given = ["train", recipe, "--model", "donor", "--output", output, "--data", *data.split()]
        return run(*given, *SIZES, *more)

    return call


def test_a_dry_run_writes_nothing(train: Run, work: Path) -> None:
    code, out, _ = train("--dry-run", output="never")
    assert code == 0 and "mine" in out and "ZeRO" in out
    assert not (work / "never").exists()


def test_it_writes_what_convert_writes(train: Run, run: Run, work: Path) -> None:
    code, out, _ = train(output="trained")
    assert (code, out) == (0, "")
    options = ("--recipe", "mine.yaml", "--model", "donor", "--output", "converted")
    data = ("--data", "one.jsonl", "--eval-tokens", "0")
    assert run("convert", *options, *SIZES, *data)[0] == 0
    mine = load_file(work / "trained" / "model.safetensors")
    theirs = load_file(work / "converted" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    code, _, err = train(output="trained")
    assert code == 0 and "trained is complete" in err


def test_several_sources_are_mixed(train: Run, work: Path) -> None:
    code, _, _ = train(output="mixed", data="one.jsonl:0.7 two.jsonl:0.3")
    assert code == 0
    kept = read_recipe(work / "mixed" / "recipe.yaml").data
    assert kept == f"{work / 'one.jsonl'}:0.7 + {work / 'two.jsonl'}:0.3"


def test_tensorboard_s_files_stay(train: Run, work: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train("--report-to", "tensorboard", output="shown")[0] == 0
    (events,) = (work / "shown" / "logs" / "2-train").glob("events.*")
    assert events.stat().st_size > 0


MISTAKES: dict[str, tuple[dict[str, str], list[str], str]] = {
    "missing data": ({"data": "no.jsonl"}, [], "no.jsonl' is not there"),
    "missing in a mixture": (
        {"data": "one.jsonl:0.5 no.jsonl:0.5"},
        [],
        "no.jsonl' is not there",
    ),
    "empty data": ({"data": "empty.jsonl"}, [], "empty.jsonl' has no text"),
    "no text column": ({"data": "other.jsonl"}, [], "(columns: id, body): say which is"),
    "weight": ({"data": "one.jsonl:-1"}, [], "'one.jsonl:-1': a weight is a number above 0"),
    "recipe": ({"recipe": "ltee"}, [], "unknown recipe 'ltee'; did you mean 'lte'?"),
    "no JSON": ({}, ["--deepspeed", "zero9"], "unknown DeepSpeed configuration 'zero9'"),
    "batch": (
        {},
        ["--deepspeed", "batch.json"],
        "train_batch_size is 7, but batch_size * accumulate * processes of the recipe is 4",
    ),
    "optimizer": ({}, ["--deepspeed", "adam.json"], "the recipe sets the optimizer"),
    "reporter": ({}, ["--report-to", "tensorbord"], "unknown reporter 'tensorbord'; did you mean"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, train: Run, work: Path) -> None:
    given, more, message = MISTAKES[name]
    code, out, err = train(*more, **given)
    assert (code, out) == (2, "") and message in err
    assert err.startswith("moe-tools: ") and err.count("\n") == 1
    assert not (work / "new").exists()


def test_a_loss_that_is_not_finite_keeps_what_is_done(train: Run, work: Path) -> None:
    code, out, err = train(recipe="wild.yaml", output="wild")
    assert (code, out) == (2, "")
    assert "lower the learning rate" in err.splitlines()[-1]
    assert (work / "wild" / "steps" / "1-attach").is_dir()
