"""`--dry-run` as a user types it: what would be done, and nothing done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import build
from tests.tiny import Run

CONVERT = ("convert", "--dry-run")
RECIPE = """
name: mine
paper: arXiv 2402.06126
data: owner/name
steps:
  - split: {expert_size: 8}
  - attach: {}
  - fit: {tokens: 4096}
  - train: {mode: straight, tokens: 1_048_576, batch_size: 8}
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Donors without weights, and mine.yaml."""
    for family in ("llama", "gpt2"):
        build(family).config.save_pretrained(tmp_path / family)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(*CONVERT, "--recipe", "mine.yaml", "--model", "llama", "--processes", "2")
    assert code == 0
    assert "recipe  mine (arXiv 2402.06126)" in out
    assert "model   llama: LlamaForCausalLM, " in out
    assert "owner/name: a hub dataset, not asked for now; 1,048,576 tokens are read" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["0", "split", "4,096", "-", "-", "-", "-"] in lines
    (fit,) = [line for line in lines if line[:2] == ["2", "fit"]]
    assert fit[-2:] == [f"{2 * 4096 * (16 * 2 + 6 * 2) / 1e9:.3g}", "GB"]  # 2 FFNs, 6 experts
    (train,) = [line for line in lines if line[:2] == ["3", "train"]]
    assert train[2:4] == ["1,048,576", "128"]  # 2048 blocks of 512, 16 a step
    ways = [f"ZeRO-{way}" for way in ("0", "1", "2", "2_offload", "3", "3_offload")]
    assert [line[0] for line in lines if line[:1] and line[0].startswith("ZeRO")] == 2 * ways
    assert "time    " in out and "2 x A100-80GB at 30% of its bf16 FLOP/s" in out
    assert "of checkpoints, " in out and "of weights in the end" in out
    assert ["memory", "1", "GPU", "2", "GPUs", "8", "GPUs", "64", "GPUs"] in lines
    assert sorted(tmp_path.rglob("*")) == before


def test_json_has_every_figure(run: Run) -> None:
    code, out, _ = run(*CONVERT, "--recipe", "mine.yaml", "--model", "llama", "--json", "-")
    found = json.loads(out)
    assert code == 0 and [step["verb"] for step in found["steps"]] == [
        "split",
        "attach",
        "fit",
        "train",
    ]
    train = found["steps"][3]
    states = train["states"]
    assert states["optimizer"] > 2 * states["gradients"] and states["teacher"] == 0
    held = states["weights"] + states["gradients"] + states["optimizer"]
    one = held + train["activations"] + train["logits"]
    ways = ("0", "1", "2", "2_offload", "3", "3_offload")
    assert tuple(found["memory"]["1"]) == ways == tuple(need["way"] for need in found["needs"])
    assert all(found["memory"]["1"][stage] == one for stage in "0123")
    assert found["memory"]["8"]["3"] == pytest.approx(one - held + held / 8 + states["layer"])
    assert found["machine"] == {
        "gpu": "A100-80GB",
        "processes": 1,
        "per_node": 8,
        "mfu": 0.3,
        "network": 400,
    }
    assert found["hours"] == pytest.approx(found["flops"] / (312e12 * 0.3 * 3600))
    assert found["data"] == [
        {"name": "owner/name", "kind": "hub", "there": None, "tokens": 1_048_576, "disk": 0}
    ]
    assert (found["tokens"], found["optimizer_steps"]) == (1_048_576, 256)
    assert found["flops"] == sum(step["flops"] for step in found["steps"]) > 0


def test_options_reach_the_plan(run: Run) -> None:
    words = ("--tokens", "65536", "--data", "no.txt", "--dtype", "fp32", "--expert-size", "4")
    _, out, _ = run(*CONVERT, "--recipe", "mine.yaml", "--model", "llama", *words, "--json", "-")
    found = json.loads(out)
    assert found["tokens"] == 65536
    assert found["data"][0]["there"] is False
    states = found["steps"][3]["states"]
    assert states["optimizer"] == 2 * states["gradients"]  # fp32 is its own master


def test_the_machine_is_an_option(run: Run) -> None:
    where = ("--gpu", "h100", "--processes", "64", "--gpus-per-node", "4", "--mfu", "0.4")
    words = ("--recipe", "mine.yaml", "--model", "llama", *where, "--network", "800")
    _, out, _ = run(*CONVERT, *words, "--json", "-")
    found = json.loads(out)
    assert found["hours"] == pytest.approx(found["flops"] / (64 * 989e12 * 0.4 * 3600))
    assert found["needs"][1]["sending"] == pytest.approx(found["needs"][1]["sent"] / 100e9)
    assert found["steps"][3]["step_tokens"] == 8 * 512 * 64
    _, out, _ = run(*CONVERT, *words)
    assert "64 x H100-80GB, 4 in a node; * does not fit" in out


MISTAKES = {
    "card": (
        ("--method", "lte", "--model", "llama", "--gpu", "a100"),
        "the card 'a100' may be A100-40GB or A100-80GB: say which",
    ),
    "utilisation": (
        ("--method", "lte", "--model", "llama", "--mfu", "40"),
        "--mfu: '40' is not above 0 and at most 1",
    ),
    "impossible step": (
        ("--method", "turbosparse", "--model", "gpt2"),
        "transformer.h.0.mlp has no gate, which DReLU needs",
    ),
    "expert size": (
        ("--recipe", "mine.yaml", "--model", "llama", "--expert-size", "49"),
        "model.layers.0.mlp has 48 neurons: experts of 49 are not possible",
    ),
    "no model": (("--method", "lte", "--model", "no/model"), "cannot read the config of no/model"),
    "processes": (
        ("--method", "lte", "--model", "llama", "--processes", "0"),
        "--processes: '0' is no whole number of at least 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, run: Run) -> None:
    words, message = MISTAKES[mistake]
    code, out, err = run(*CONVERT, *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


def test_without_it_an_output_is_needed(run: Run) -> None:
    code, _, err = run("convert", "--method", "lte", "--model", "llama")
    assert code == 2 and "--output is required, except with --dry-run" in err


def test_what_trains_nothing_needs_its_weights(run: Run) -> None:
    code, out, _ = run(*CONVERT, "--method", "cmoe", "--model", "llama", "--expert-size", "8")
    assert code == 0 and "weights alone: no step trains" in out
