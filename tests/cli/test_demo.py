"""`moe-tools demo` with a tiny donor in place of SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_tools.checkpoint.saving import save
from tests.families import build
from tests.tiny import Run, build_tokenizer


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """donor/, which the demo takes for its own."""
    save(build("llama"), tmp_path / "donor", build_tokenizer())
    monkeypatch.setattr("moe_tools.cli.demo.donor_file", lambda: tmp_path / "donor")
    return tmp_path


def test_the_demo_shows_a_table_two_texts_and_what_to_try(run: Run, work: Path) -> None:
    words = ("--output", "out", "--tokens", "4096", "--eval-tokens", "512")
    code, out, err = run("demo", *words)
    assert code == 0
    table, dense, converted, end = out.split("\n\n")[-4:]
    assert "blocks of 512, bfloat16 on cpu" in table
    models = [line[2:16].strip() for line in table.splitlines() if "FLOPs" not in line]
    assert {"donor (donor)", "out/control", "out"} <= set(models)
    assert dense.startswith("dense donor:\n") and converted.startswith("converted:\n")
    assert end.startswith("The converted model is in out/ (a Hugging Face folder). Try next:\n")
    assert err.count("32 tokens in") == 2
    assert err.index("; dense, prompt included") < err.index("; FFN sparsity")
    metrics = json.loads((work / "out" / "metrics.json").read_text())
    assert metrics["train_tokens"] == 4096


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "0"), "--tokens: '0' is no whole number of at least 1"),
        (("--eval-tokens", "-1"), "--eval-tokens: '-1' is no whole number of at least 0"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], message: str, run: Run, work: Path) -> None:
    code, out, err = run("demo", *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
