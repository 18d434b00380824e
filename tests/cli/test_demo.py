"""`moe-tools demo` with a tiny donor in place of SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_tools.checkpoint.saving import save
from tests.families import build
from tests.tiny import Run, build_tokenizer

TIMED = [
    "dense",
    "dense, all linears int4",
    "half off, native kernels",
    "half off, the others int4",
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """donor/, which the demo takes for its own."""
    save(build("llama", hidden_size=32), tmp_path / "donor", build_tokenizer())
    monkeypatch.setattr("moe_tools.cli.demo.donor_file", lambda: tmp_path / "donor")
    return tmp_path


def test_the_demo_shows_tables_speeds_texts_and_what_to_try(run: Run, work: Path) -> None:
    words = ("--output", "out", "--tokens", "4096", "--eval-tokens", "512")
    code, out, err = run("demo", *words)
    assert code == 0, err
    prox, speed, texts, lte = out.split("\n## ")[1:]
    assert "dense int8" in prox and "dense int4" in prox and "out/prox" in prox
    timed = [line for line in speed.splitlines() if line.endswith(" x dense")]
    assert [line.split("  ")[1] for line in timed] == TIMED
    assert "dense:\n" in texts and "50% of the neurons off:\n" in texts
    assert "dense int4" in lte and "out/lte" in lte and "half of the FLOPs off:\n" in lte
    assert "The converted models are in out/ (Hugging Face folders). Try next:\n" in lte
    assert err.count(" tokens in ") == 3
    assert err.index("; dense, prompt included") < err.index("; FFN sparsity")
    metrics = json.loads((work / "out" / "lte" / "metrics.json").read_text())
    assert metrics["train_tokens"] == 4096


def test_the_demo_can_leave_training_out(run: Run, work: Path) -> None:
    code, out, _ = run("demo", "--output", "out", "--eval-tokens", "512", "--no-train")
    assert code == 0 and "LTE" not in out
    assert sorted(path.name for path in (work / "out").iterdir()) == ["prox"]


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
