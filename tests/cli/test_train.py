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


LOOKING = """
name: looking
steps:
  - split: {expert_size: 8, tokens: 256}
  - attach: {start_sparsity: 0.1, tokens: 256}
  - train: {mode: soft, tokens: 512, target_sparsity: 0.4, evaluate_every: 3, evaluate_tokens: 256}
"""


def test_held_out_text_is_that_of_evaluate(train: Run, run: Run, work: Path) -> None:
    """And it is mode hard that is measured, as the folder has it."""
    (work / "looking.yaml").write_text(LOOKING)
    assert train(recipe="looking.yaml", output="looked")[0] == 0
    (step,) = (one for one in json.loads((work / "looked/metrics.json").read_text())["steps"][2:])
    looks = {entry["step"]: entry for entry in step["history"] if "heldout_lm" in entry}
    assert list(looks) == [3, 6, 8]
    given = ("--data", "one.jsonl", "--tokens", "256", "--json", "-")
    code, out, _ = run("evaluate", "looked", *given, *SIZES)
    row = json.loads(out)[-1]
    assert code == 0
    assert looks[8]["heldout_perplexity"] == pytest.approx(row["perplexity"], rel=1e-4)


def test_text_without_a_held_out_part_is_said_before_the_run(train: Run, work: Path) -> None:
    (work / "looking.yaml").write_text(LOOKING)
    (work / "short.jsonl").write_text(json.dumps({"text": "w1 w2 " * 20}))
    code, _, err = train(recipe="looking.yaml", output="never", data="short.jsonl")
    assert code == 2 and "(heldout) has 3 tokens, one block needs 16" in err.splitlines()[-1]
    assert not (work / "never").exists()


def test_a_run_whose_time_is_up_goes_on_where_it_stopped(train: Run, work: Path) -> None:
    """Every start does a step, or an optimizer step of one that trains."""
    (work / "looking.yaml").write_text(LOOKING)
    assert train(recipe="looking.yaml", output="undisturbed")[0] == 0
    said = []
    for _ in range(20):
        code, out, err = train("--max-hours", "1e-9", recipe="looking.yaml", output="stopped")
        if code == 0:
            break
        assert (code, out) == (75, "")
        said.append(err.splitlines()[-1])
    assert said == [
        f"moe-tools: stopped {where}: the time of the run is up (--max-hours 1e-09); nothing is "
        "lost, and the same command goes on from there"
        for where in (
            "before step 1, attach",
            "before step 2, train",
            *(f"after optimizer step {at} of 8" for at in range(1, 8)),
        )
    ]
    mine = load_file(work / "stopped" / "model.safetensors")
    theirs = load_file(work / "undisturbed" / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


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
    "hours": ({}, ["--max-hours", "0"], "--max-hours: '0' is no number above 0"),
    "peak": ({}, ["--peak-flops", "fast"], "--peak-flops: 'fast' is no number above 0"),
    "attention": ({}, ["--attention", "flash"], "--attention: invalid choice: 'flash'"),
    "flash attention": (
        {},
        ["--attention", "flash_attention_2"],
        "--attention flash_attention_2 runs on a GPU alone, but the run is on cpu",
    ),
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
