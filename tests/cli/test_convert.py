"""`moe-tools convert` as a user types it: one line for every mistake, a table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from tests.families import build
from tests.tiny import WORDS, Run, write_passages
from tests.tiny import build_tokenizer as tokenizer

RECIPE = """
name: mine
steps:
  - split: {expert_size: 8, tokens: 256}
  - attach: {start_sparsity: 0.1, tokens: 256}
  - train: {mode: straight, tokens: 1024, target_sparsity: 0.4, lr: 1e-3}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/, mamba/, bert/, no-tokenizer/, texts and recipes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    save(build("llama"), folder / "donor", tokenizer())
    save(build("llama"), folder / "no-tokenizer")
    save(build("bert"), folder / "bert", tokenizer())
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    save(mamba, folder / "mamba", tokenizer())
    write_passages(folder / "text.txt", 200)
    (folder / "short.txt").write_text(" ".join(WORDS))
    write_passages(folder / "medium.txt", 25)
    (folder / "empty.txt").write_text("")
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "typo.yaml").write_text(RECIPE.replace("start_sparsity", "start_sparsty"))
    (folder / "dense.yaml").write_text("name: d\nsteps: [train: {tokens: 512}]")
    (folder / "wild.yaml").write_text(RECIPE.replace("1e-3", "1e30"))
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("mine")
    return folder


def words(**options: str | None) -> list[str]:
    """A good command line, with options changed, added, or left out by None."""
    defaults = {
        "recipe": "mine.yaml",
        "model": "donor",
        "output": "new",
        "data": "text.txt",
        "block_length": "16",
        "eval_tokens": "256",
        "dtype": "fp32",
    }
    given = {**defaults, **options}
    pairs = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return ["convert", *(word for name, value in pairs.items() for word in (f"--{name}", value))]


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"recipe": None, "method": "ltee"}, "unknown recipe 'ltee'; did you mean 'lte'?"),
    "no method": ({"recipe": None}, "one of the arguments --method --recipe is required"),
    "two methods": ({"method": "lte"}, "argument --method: not allowed with argument --recipe"),
    "no recipe file": ({"recipe": "no.yaml"}, "no.yaml does not exist; `moe-tools recipes` lists"),
    "recipe key": (
        {"recipe": "typo.yaml"},
        "typo.yaml: step 1 (attach): unknown key 'start_sparsty'; did you mean 'start_sparsity'?",
    ),
    "family": ({"model": "mamba"}, "MambaForCausalLM has no FFN that moe-tools can find"),
    "encoder": ({"model": "bert"}, "BertForMaskedLM is neither a causal language model nor a"),
    "expert size": (
        {"expert_size": "49"},
        "model.layers.0.mlp has 48 neurons: experts of 49 are not possible",
    ),
    "no expert": ({"expert_size": "0"}, "--expert-size: '0' is no whole number of at least 1"),
    "output of others": ({"output": "other"}, "other exists and is not empty: choose another"),
    "output is a file": (
        {"output": "text.txt"},
        "text.txt exists and is not empty: choose another",
    ),
    "empty data": ({"data": "empty.txt"}, "empty.txt' has no text"),
    "no data": ({"data": "no.txt"}, "no.txt' is not there"),
    "short data": (
        {"data": "short.txt", "block_length": "512"},
        "tokens, one block needs 512: use --block-length",
    ),
    "sparsity": (
        {"target_sparsity": "1.5"},
        "train: target_sparsity is 1.5, but must be strictly between 0 and 1",
    ),
    "sparsity in words": ({"target_sparsity": "half"}, "invalid float value: 'half'"),
    "no target": (
        {"recipe": "dense.yaml", "target_sparsity": "0.5"},
        "recipe d has no step with a target_sparsity",
    ),
    "no split": ({"recipe": "dense.yaml", "expert_size": "8"}, "recipe d has no split step"),
    "no tokens": ({"tokens": "0"}, "--tokens: '0' is no whole number of at least 1"),
    "missing model": ({"model": "no/such/model"}, "no/such/model"),
    "missing GGUF": ({"model": "no.gguf"}, "no.gguf"),
    "no tokenizer": ({"model": "no-tokenizer"}, "no-tokenizer has no tokenizer"),
    "dtype": ({"dtype": "fp8"}, "invalid choice: 'fp8'"),
    "device": ({"device": "tpu7"}, "--device tpu7 cannot be used here"),
    "json": ({"json": "no/such/table.json"}, "'no/such/table.json' is no file in a folder that"),
    "eval tokens": ({"eval_tokens": "-1"}, "--eval-tokens: '-1' is no whole number of at least 0"),
    "short held-out text": (
        {"data": "medium.txt", "block_length": "256"},
        "medium.txt' (heldout) has 61 tokens, one block needs 256: use --block-length 32",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake: str, run: Run, work: Path) -> None:
    options, message = MISTAKES[mistake]
    before = everything(work)
    code, out, err = run(*words(**options))
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("moe-tools: ")
    assert message in line
    assert everything(work) == before


def test_a_good_run_ends_with_a_table(run: Run, work: Path) -> None:
    code, out, err = run(*words(output="good", json="good.json"), "--control")
    assert code == 0
    assert "Traceback" not in err and "(donor)" in out and "sparsity" in out
    assert all(line.startswith("moe-tools: ") for line in err.splitlines())
    donor, control, model = json.loads((work / "good.json").read_text())
    assert [row["role"] for row in (donor, control, model)] == ["donor", "control", "model"]
    assert (model["model"], control["model"]) == ("good", "good/control")
    assert model["ffn_sparsity"] == pytest.approx(0.4, abs=0.1)
    assert model["train_tokens"] == control["train_tokens"] == 1024
    assert model["ratio_to_donor"] > 0 and model["ratio_to_control"] > 0
    assert {row["tokens"] for row in (donor, control, model)} == {16 * 15}
    assert len(expert_ffns(load(work / "good"))) == 2


def test_json_on_standard_output_is_nothing_but_json(run: Run) -> None:
    code, out, err = run(*words(output="piped", json="-"))
    assert code == 0
    assert [row["model"] for row in json.loads(out)][-1] == "piped"
    assert "sparsity" in err


def test_the_same_command_again_only_measures(run: Run, work: Path) -> None:
    first = run(*words(output="twice", json="-"))
    before = everything(work / "twice")
    again = run(*words(output="twice", json="-"))
    assert first[0] == again[0] == 0
    assert "twice is complete" in again[2]
    for one, other in zip(json.loads(first[1]), json.loads(again[1]), strict=True):
        assert one["perplexity"] == other["perplexity"]
    assert everything(work / "twice") == before


def test_the_options_reach_the_recipe(run: Run, work: Path) -> None:
    options = {"target_sparsity": "0.6", "expert_size": "20", "tokens": "512", "seed": "3"}
    code, out, _ = run(*words(output="options", eval_tokens="0", **options), "--keep-steps")
    assert (code, out) == (0, "")  # no table
    written = (work / "options" / "recipe.yaml").read_text()
    for line in ("target_sparsity: 0.6", "expert_size: 20", "tokens: 512", "seed: 3"):
        assert line in written
    assert {ffn.division.sizes for ffn in expert_ffns(load(work / "options"))} == {(24, 24)}
    assert (work / "options" / "steps" / "0-split").is_dir()


def test_other_options_do_not_touch_a_finished_run(run: Run, work: Path) -> None:
    assert run(*words(output="mine", eval_tokens="0"))[0] == 0
    before = everything(work / "mine")
    code, _, err = run(*words(output="mine", eval_tokens="0", tokens="2048"))
    assert code == 2
    assert err.count("\n") == 1 and "mine holds another run" in err
    assert everything(work / "mine") == before


def test_a_converted_model_is_no_donor(run: Run, work: Path) -> None:
    assert run(*words(output="once", eval_tokens="0"))[0] == 0
    code, _, err = run(*words(model="once", output="new"))
    assert code == 2
    assert err.count("\n") == 1 and "is routed already: start from the dense model" in err
    assert not (work / "new").exists()


def test_the_shipped_method_on_the_donor_s_own_samples(run: Run) -> None:
    short = {"recipe": None, "method": "lte", "tokens": "512", "data": "self"}
    assert run(*words(output="own", eval_tokens="0", **short))[0] == 0


def test_text_too_short_for_a_table_is_enough_without_one(run: Run) -> None:
    options = {"data": "medium.txt", "block_length": "64", "eval_tokens": "0"}
    assert run(*words(output="no-table", **options))[0] == 0


def test_a_loss_that_is_not_finite_is_exit_code_2(run: Run, work: Path) -> None:
    code, out, err = run(*words(recipe="wild.yaml", output="wild"))
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert all(line.startswith("moe-tools: ") for line in lines)
    assert "lower the learning rate" in lines[-1]
    assert not (work / "wild" / "metrics.json").exists()
    assert (work / "wild" / "steps" / "1-attach").is_dir()  # what is done is kept


@pytest.mark.slow
def test_deepspeed_mixed_text_and_tensorboard_are_options_of_convert_too(
    run: Run, work: Path
) -> None:
    line = words(output="zero", json="-", deepspeed="zero2", data=None, report_to="tensorboard")
    code, out, err = run(*line, "--data", "text.txt:0.5", "medium.txt:0.5")
    assert code == 0, err
    donor, model = json.loads(out)
    assert donor["data"] == f"{work / 'text.txt'}:0.5 + {work / 'medium.txt'}:0.5"
    assert model["train_tokens"] == 1024
    assert list((work / "zero" / "logs" / "2-train").glob("events.*"))
