"""What a user who is wrong is told: one line with the value, the rule and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification, LlamaModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from tests.families import build
from tests.tiny import Run, build_tokenizer, write_passages

RECIPE = "name: test\ndata: text.txt\nblock_length: 16\nsteps:\n- split: {tokens: 64}\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("work"), build_tokenizer()
    host = build("llama")
    save(host, folder / "donor", tokenizer)
    save(build("bert"), folder / "masked", tokenizer)
    save(LlamaModel(host.config), folder / "body", tokenizer)
    host.config.num_labels = 3
    save(LlamaForSequenceClassification(host.config), folder / "classifier", tokenizer)
    write_passages(folder / "text.txt", 200)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


PREDICT = ("convert", "--method", "predictors", "--data", "text.txt", "--output", "new")
PREDICT += ("--block-length", "16")
MISTAKES = {
    "a body continues no text": (
        ("generate", "body", "--prompt", "w1"),
        "LlamaModel continues no text: generate with a causal model",
    ),
    "nor does a model of masked tokens": (
        ("generate", "masked", "--prompt", "w1"),
        "BertForMaskedLM continues no text: generate with a causal model",
    ),
    "nor a classifier": (
        ("generate", "classifier", "--prompt", "w1"),
        "LlamaForSequenceClassification continues no text: generate with a causal model",
    ),
    "a body has no perplexity": (
        ("evaluate", "body", "--data", "text.txt", "--block-length", "16"),
        "LlamaModel has no head that predicts tokens, and no perplexity: evaluate a causal or "
        "masked language model, or a classifier on labelled data; `convert` works with "
        "--eval-tokens 0",
    ),
    "nor does it get a table": (
        ("convert", "--recipe", "recipe.yaml", "--model", "body", "--output", "new"),
        "LlamaModel has no head that predicts tokens, and no perplexity: evaluate a causal or "
        "masked language model, or a classifier on labelled data; `convert` works with "
        "--eval-tokens 0",
    ),
    "nothing to predict": (
        (*PREDICT, "--model", "donor"),
        "router low_rank predicts which neurons are exactly 0, and SiLUActivation of "
        "model.layers.0.mlp leaves none: put `swap: {activation: {kind: relu}}` and `train` before "
        "it, or say in router_options from which share of the largest a neuron counts: "
        "{zero_below: 0.05}",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_said_in_one_line(name: str, run: Run, work: Path) -> None:
    words, said = MISTAKES[name]
    code, _, err = run(*words)
    assert code == 2
    assert err.splitlines()[-1] == f"moe-tools: {said}"
    assert not (work / "new").exists()


def test_a_body_is_converted_without_a_table(run: Run, work: Path) -> None:
    words = (
        "--recipe",
        "recipe.yaml",
        "--model",
        "body",
        "--output",
        "split",
        "--eval-tokens",
        "0",
    )
    assert run("convert", *words)[0] == 0
    assert type(load(work / "split")) is LlamaModel


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_goes_into_a_pipe_of_any_encoding(encoding: str, work: Path) -> None:
    model, tokenizer = build("llama"), build_tokenizer([f"词{index}" for index in range(60)])
    folder = work / f"words-{encoding}"
    save(model, folder, tokenizer)
    done = subprocess.run(
        [sys.executable, "-m", "moe_tools.cli.main", "generate", folder, "--prompt", "词1 词2"],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert ("词" if encoding == "utf-8" else r"\u8bcd") in done.stdout.decode(encoding)
