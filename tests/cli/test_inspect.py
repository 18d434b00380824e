"""`moe-tools inspect` on a tiny llama, saved with a tiny tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moe_tools
from moe_tools.checkpoint.saving import save
from moe_tools.report.report import read_json, to_json
from tests.families import build, randomize, routed
from tests.report.test_report import ROW
from tests.tiny import WORDS, build_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out/, dense/ and text.txt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    model, _ = routed(build("llama", max_position_embeddings=80))
    randomize(model)
    save(model, folder / "out", build_tokenizer())
    save(build("llama"), folder / "dense", build_tokenizer())
    text = "\n\n".join(" ".join(WORDS[i % 7 : i % 7 + 30]) for i in range(200))
    (folder / "text.txt").write_text(text)
    return folder


def test_the_json_is_what_the_api_says(run, work):
    code, out, err = run(
        "inspect", "out", "--prompt", "w1 w2 w3 w4", "--dtype", "fp32", "--json", "-"
    )
    assert code == 0 and "model.layers.1.mlp" in err
    found, expected = json.loads(out), moe_tools.inspect(work / "out", "w1 w2 w3 w4")
    assert found["tokens"] == 4 and found["sparsity"] == pytest.approx(expected.sparsity)
    assert found["ffns"] == [pytest.approx(vars(row)) for row in expected.summaries]
    assert found["experts"] == [pytest.approx(vars(row)) for row in expected.experts]


def test_what_is_not_measured_is_null(run):
    code, out, _ = run("inspect", "out", "--prompt", "w1 w2", "--no-norms", "--json", "-")
    assert code == 0 and json.loads(out)["ffns"][0]["captured"] is None


def test_held_out_text_some_ffns_and_a_page(run, work):
    words = ("--data", "text.txt", "--tokens", "64", "--block-length", "16", "--html", "a.html")
    code, out, _ = run("inspect", "out", *words, "--ffn", "model.layers.1.mlp")
    assert code == 0 and "64 tokens" in out and "model.layers.0.mlp" not in out
    page = (work / "a.html").read_text(encoding="utf-8")
    assert "out on text.txt" in page and "card-pareto" not in page


def test_a_sweep_in_the_folder_or_given_is_drawn(run, work):
    rows = [replace(ROW, ffn_flops=80e6 * share) for share in (0.5, 1)]
    (work / "rows.json").write_text(to_json(rows))
    assert read_json(work / "rows.json") == rows
    code, *_ = run("inspect", "out", "--prompt", "w1", "--html", "b.html", "--sweep", "rows.json")
    assert code == 0 and "card-pareto" in (work / "b.html").read_text(encoding="utf-8")
    (work / "rows.json").rename(work / "out" / "sweep.json")
    code, *_ = run("inspect", "out", "--prompt", "w1", "--html", "c.html")
    assert code == 0 and "card-pareto" in (work / "c.html").read_text(encoding="utf-8")
    (work / "out" / "sweep.json").unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dense", "--prompt", "w1"], "LlamaForCausalLM has no router to inspect"),
        (["text.txt", "--prompt", "w1"], "text.txt has no tokenizer"),
        (["nowhere", "--prompt", "w1"], "nowhere has no tokenizer"),
        (["out", "--prompt", " "], "--prompt is empty"),
        (["out", "--prompt", "w1 " * 81], "a text of 81 tokens exceeds the context of Llama"),
        (
            ["out", "--data", "text.txt", "--block-length", "99", "--tokens", "99"],
            "a block of 99 tokens exceeds",
        ),
        (["out", "--prompt", "w1", "--ffn", "model.layer.0.mlp"], "mean 'model.layers.0.mlp'?"),
        (["out", "--prompt", "w1", "--html", "text.txt"], "'text.txt' exists: choose another"),
        (["out", "--prompt", "w1", "--sweep", "no.json"], "--sweep no.json is no file"),
        (["out", "--prompt", "w1", "--sweep", "text.txt"], "text.txt holds no rows of"),
        (["out"], "one of the arguments --prompt --data is required"),
        (["out", "--prompt", "w1", "--data", "docs"], "not allowed with argument --prompt"),
    ],
)
def test_a_mistake_is_one_line(run, work, words, message):
    before = (work / "text.txt").read_text()
    code, out, err = run("inspect", *words)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert (work / "text.txt").read_text() == before
