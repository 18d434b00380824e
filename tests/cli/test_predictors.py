"""The recipe of neuron predictors on a tiny ReLU model, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_tools.checkpoint.saving import save
from moe_tools.recipe import recipe_path
from tests.families import build, is_router
from tests.tiny import Run, build_tokenizer, write_passages

TEXT = ("--data", "text.txt", "--block-length", "16", "--dtype", "fp32")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/, text.txt, and the shipped recipe for less text."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    write_passages(folder / "text.txt", 700)
    save(build("opt"), folder / "donor", build_tokenizer())
    shipped = recipe_path("predictors").read_text()
    small = shipped.replace("tokens: 65536, epochs: 10", "tokens: 4096, batch_size: 128, epochs: 4")
    assert small != shipped
    (folder / "small.yaml").write_text(small)
    for router in ("sign", "int8_gate"):
        (folder / f"{router}.yaml").write_text(
            f"name: {router}\nsteps:\n  - split: {{expert_size: 1, method: contiguous}}\n"
            f"  - attach: {{router: {router}, tokens: 64}}\n  - fit: {{tokens: 1024}}\n"
        )
    return folder


def convert(run: Run, recipe: str, output: str) -> tuple[int, str, str]:
    return run(
        *("convert", "--recipe", recipe, "--model", "donor", "--output", output),
        *("--eval-tokens", "512", *TEXT),
    )


def test_the_shipped_recipe_predicts(run: Run, work: Path) -> None:
    code, out, _ = convert(run, "small.yaml", "out")
    assert code == 0
    assert "recall" in out and "precision" in out
    donor, model = (
        load_file(work / "donor/model.safetensors"),
        load_file(work / "out/model.safetensors"),
    )
    host = {key: tensor for key, tensor in model.items() if not is_router(key)}
    assert host.keys() == donor.keys()
    assert all(torch.equal(host[key], donor[key]) for key in donor)  # contiguous, size 1: no-op
    fitted = json.loads((work / "out" / "metrics.json").read_text())["steps"][2]
    code, out, _ = run("evaluate", "out", "--tokens", "512", *TEXT, "--json", "-")
    dense, row = json.loads(out)
    assert code == 0 and dense["recall"] is dense["precision"] is None
    assert dense["layer_prediction"] == {}
    assert row["recall"] > 1 - row["ffn_sparsity"] + 0.1  # chance
    assert row["recall"] == pytest.approx(fitted["prediction"]["recall"], abs=0.1)
    assert row["precision"] == pytest.approx(fitted["prediction"]["precision"], abs=0.1)
    assert row["layer_prediction"].keys() == row["layer_sparsity"].keys()
    for name, one in row["layer_prediction"].items():
        assert one["sparsity"] == pytest.approx(row["layer_sparsity"][name])
    seen = row["layer_prediction"].values()
    assert row["recall"] == sum(one["hits"] for one in seen) / sum(one["nonzero"] for one in seen)


@pytest.mark.parametrize("router", ["sign", "int8_gate"])
def test_predictors_without_training_are_measured(router: str, run: Run, work: Path) -> None:
    code, out, _ = convert(run, f"{router}.yaml", router)
    assert code == 0 and "recall" in out
    fitted = json.loads((work / router / "metrics.json").read_text())["steps"][2]
    assert all(one["loss"] is None for one in fitted["routers"].values())
    assert fitted["prediction"]["recall"] > (0.99 if router == "int8_gate" else 0.7)
    code, out, _ = run("evaluate", router, "--tokens", "512", *TEXT, "--json", "-")
    assert json.loads(out)[1]["recall"] > (0.99 if router == "int8_gate" else 0.7)


def test_the_recall_of_a_sweep_falls_with_tau(run: Run) -> None:
    assert convert(run, "sign.yaml", "sign")[0] == 0
    words = ("evaluate", "sign", "--tokens", "512", *TEXT, "--sweep", "0.3", "0.5", "0.6")
    _, *rows = json.loads(run(*words, "--json", "-")[1])
    recalls = [row["recall"] for row in rows]
    assert recalls == sorted(recalls, reverse=True) and recalls[0] > recalls[-1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank: 128", "rank: 0", "a low-rank router needs rank >= 1, not 0"),
        ("rank: 128", "ranks: 8", "router low_rank with {'ranks': 8, 'positive_weight': 2.0}: "),
        ("positive_weight: 2.0", "zero_below: 2", "needs zero_below in [0, 1), not 2"),
        ("router: low_rank", "router: low_rnak", "unknown router 'low_rnak'; did you mean"),
        ("expert_size: 1", "expert_size: 0", "expert_size is 0, but must be at least 1"),
    ],
)
def test_mistakes_are_one_line(old: str, new: str, message: str, run: Run, work: Path) -> None:
    text = (work / "small.yaml").read_text()
    assert old in text
    (work / "wrong.yaml").write_text(text.replace(old, new))
    code, _, err = convert(run, "wrong.yaml", "wrong")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (work / "wrong").exists()
