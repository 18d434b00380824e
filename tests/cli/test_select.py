"""Selection by the prompt, on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tiny import Run

GENERATE = ("--prompt", "w1 w5 w2 w9 w4 w4 w7", "--max-new-tokens", "12", "--dtype", "fp32")
CONVERT = ("convert", "--method", "griffin", "--model", "donor", "--data", "text.txt")


@pytest.fixture
def folder(run: Run, work: Path) -> str:
    if not (work / "selecting").exists():
        words = ("--output", "selecting", "--target-sparsity", "0.75", "--dtype", "fp32")
        code, _, err = run(*CONVERT, *words, "--eval-tokens", "64", "--block-length", "16")
        assert code == 0, err
        assert "every block is one: its row is dense" in err
    return "selecting"


@pytest.mark.parametrize(("words", "share"), [((), 50.0), (("--share", "0.25"), 25.0)])
def test_generate_says_how_many_neurons_ran_after_the_prompt(
    words: tuple[str, ...], share: float, run: Run
) -> None:
    code, out, err = run("generate", "donor", *GENERATE, "--select", "prompt", *words)
    assert code == 0
    assert out.strip()
    assert f"; {share}% of the neurons ran after the prompt" in err


def test_all_neurons_say_what_the_dense_model_says(run: Run) -> None:
    dense = run("generate", "donor", *GENERATE)
    every = run("generate", "donor", *GENERATE, "--select", "prompt", "--share", "1")
    assert every[:2] == dense[:2]
    assert "100.0% of the neurons ran after the prompt" in every[2]


def test_a_folder_selects_by_itself(run: Run, folder: str) -> None:
    """And another share may be asked for."""
    by_itself = run("generate", folder, *GENERATE)
    asked = run("generate", "donor", *GENERATE, "--select", "prompt", "--share", "0.25")
    assert by_itself[:2] == asked[:2]
    assert "; 25.0% of the neurons ran after the prompt" in by_itself[2]
    code, _, err = run("generate", folder, *GENERATE, "--select", "prompt", "--share", "0.75")
    assert code == 0
    assert "; 75.0% of the neurons ran after the prompt" in err


def test_a_single_new_token_is_of_the_prompt(run: Run, folder: str) -> None:
    code, _, err = run("generate", folder, "--prompt", "w1 w2", "--max-new-tokens", "1")
    assert code == 0
    assert "nothing was generated on the KV cache: every neuron ran" in err


def test_evaluate_says_that_its_row_is_dense(run: Run, folder: str) -> None:
    words = ("--data", "text.txt", "--tokens", "128", "--block-length", "16", "--dtype", "fp32")
    code, out, err = run("evaluate", folder, *words, "--json", "-")
    assert code == 0
    assert "selecting selects neurons by the prompt, and every block is one" in err
    rows = {Path(row["model"]).name: row for row in json.loads(out)}
    assert rows["selecting"]["ffn_sparsity"] == 0
    assert rows["selecting"]["perplexity"] == rows["donor"]["perplexity"]


def test_export_writes_the_dense_model(run: Run, work: Path, folder: str) -> None:
    code, _, err = run("export", folder, "--to", "dense", "--output", "plain", "--no-check")
    assert code == 0, err
    assert "moe_tools" not in json.loads((work / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("donor", "--share", "0.5"), "add --select prompt"),
        (("donor", "--select", "prompt", "--share", "0"), "share is 0, but must be above 0"),
        (("donor", "--select", "prompt", "--share", "nan"), "share is nan, but must be above 0"),
        (("donor", "--select", "prompt", "--optimize"), "a smaller dense FFN runs, which"),
        (("selecting", "--optimize"), "a smaller dense FFN runs, which --optimize does not pack"),
        (("out", "--select", "prompt"), "LlamaForCausalLM is routed, which selects neurons"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistakes_are_one_line(words: tuple[str, ...], said: str, run: Run) -> None:
    code, _, err = run("generate", *words, *GENERATE)
    assert code == 2
    assert len(re.findall("\n", err)) == 1
    assert said in err
