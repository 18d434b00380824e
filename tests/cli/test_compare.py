"""`compare` and `evaluate --sweep`: several operating points of a tiny llama in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_tools.checkpoint.loading import load
from moe_tools.experts.experts import expert_ffns
from moe_tools.lock import held
from moe_tools.recipe import read_recipe
from tests.tiny import EVALUATE, Run, rows_of

TRAINED = """
name: trained
block_length: 16
steps:
  - split: {method: random}
  - attach: {start_sparsity: 0.1, tokens: 256}
  - train: {mode: straight, tokens: 256, target_sparsity: 0.4}
"""
FITTED = """
name: fitted
block_length: 16
steps:
  - split: {expert_size: 7, method: contiguous, shared_experts: 1}
  - attach: {router: norm, router_options: {hidden: 4}, selector: {kind: dynamic_k, tau: 0.5}}
  - fit: {tokens: 256, epochs: 2}
  - budget: {target_sparsity: 0.4, tokens: 256}
"""
COMPARE = ("--model", "donor", "--data", "text.txt", "--eval-tokens", "128", "--dtype", "fp32")


@pytest.fixture
def recipes(work: Path) -> list[str]:
    (work / "trained.yaml").write_text(TRAINED)
    (work / "fitted.yaml").write_text(FITTED)
    return ["trained.yaml", "fitted.yaml"]


def compared(run: Run, *words: str) -> list[dict[str, Any]]:
    code, out, err = run("compare", *words, *COMPARE, "--json", "-")
    assert code == 0, err
    return json.loads(out)


def test_every_recipe_at_every_sparsity(run: Run, work: Path, recipes: list[str]) -> None:
    sparsities = ("--target-sparsity", "0.2", "0.4")
    rows = compared(run, *recipes, "--output", "study", *sparsities, "--baselines", "teal", "cats")
    assert [(row["role"], row["series"]) for row in rows] == [
        ("donor", ""),
        ("control", ""),
        *[("model", name) for name in ("trained", "fitted", "TEAL", "CATS") for _ in range(2)],
    ]
    donor, control, *models = rows
    assert control["model"] == "study/trained-0.2/control" and control["train_tokens"] == 256
    for row, target in zip(models, [0.2, 0.4] * 4, strict=True):
        assert row["ratio_to_donor"] == pytest.approx(row["perplexity"] / donor["perplexity"])
        if row["series"] == "fitted":  # trains nothing: the donor is its control
            assert row["ratio_to_control"] is None
        else:
            ratio = row["perplexity"] / control["perplexity"]
            assert row["ratio_to_control"] == pytest.approx(ratio)
        if row["series"] == "fitted":
            assert row["ffn_sparsity"] == pytest.approx(target, abs=0.1)
        if row["series"] == "TEAL":  # of attention, too; CATS computes the gate in full
            assert row["ffn_share"] == pytest.approx(1 - target, abs=0.15)
            assert row["total_flops"] < row["total_dense_flops"]
        if row["series"] == "CATS":
            assert row["ffn_share"] == pytest.approx(1 - target * 2 / 3, abs=0.05)
    assert json.loads((work / "study" / "table.json").read_text()) == rows
    assert (work / "study" / "pareto.svg").read_text().startswith("<?xml")


def test_what_does_not_depend_on_the_sparsity_is_done_once(
    run: Run, work: Path, recipes: list[str]
) -> None:
    words = (recipes[1], "--output", "once", "--target-sparsity", "0.2", "0.4")
    first = compared(run, *words)
    fits = [work / "once" / f"fitted-{s}" / "steps" / "2-fit" / "metrics.json" for s in (0.2, 0.4)]
    assert fits[0].samefile(fits[1])
    assert read_recipe(work / "once" / "fitted-0.4" / "recipe.yaml").name == "fitted"
    stamps = [fit.stat().st_mtime_ns for fit in fits]
    again = compared(run, *words)
    assert [fit.stat().st_mtime_ns for fit in fits] == stamps
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in first]


def test_tokens_are_given_to_recipes_that_train_none_by_default(run: Run, work: Path) -> None:
    (work / "none.yaml").write_text(TRAINED.replace("tokens: 256, target", "tokens: 0, target"))
    *_, row = compared(
        run, "none.yaml", "--output", "given", "--target-sparsity", "0.4", "--tokens", "256"
    )
    assert row["train_tokens"] == 256


def test_two_comparisons_do_not_write_one_folder(run: Run, work: Path, recipes: list[str]) -> None:
    words = ("--output", "both", "--target-sparsity", "0.2")
    with held(work / "both"):
        code, _, err = run("compare", recipes[1], *words, *COMPARE)
    assert code == 2 and "both is being written by process" in err
    assert not (work / "both").exists()


def test_a_seed_has_folders_of_its_own(run: Run, work: Path, recipes: list[str]) -> None:
    words = (recipes[1], "--output", "seeds", "--target-sparsity", "0.2")
    *_, first = compared(run, *words, "--seed", "1")
    made = work / "seeds" / "fitted-0.2-1" / "metrics.json"
    stamp = made.stat().st_mtime_ns
    *_, one, two = compared(run, *words, "--seed", "1", "2")
    assert made.stat().st_mtime_ns == stamp and first["perplexity"] == one["perplexity"]
    assert (one["seed"], two["seed"]) == (1, 2) and one["run_text"] != two["run_text"]
    compared(run, *words)  # as the recipe says: another folder, which adopts nothing
    assert (work / "seeds" / "fitted-0.2").is_dir()


def test_runs_of_a_text_that_moved_are_not_mixed_in(
    run: Run, work: Path, recipes: list[str]
) -> None:
    (work / "moving.txt").write_text((work / "text.txt").read_text())
    words = ("compare", recipes[0], *COMPARE, "--data", "moving.txt", "--output", "moved")
    code, out, _ = run(*words, "--target-sparsity", "0.2")
    assert code == 0
    kept = json.loads((work / "moved" / "trained-0.2" / "metrics.json").read_text())["text"]
    rows = json.loads((work / "moved" / "table.json").read_text())
    assert (rows[0]["run_text"], rows[2]["run_text"]) == ("", kept) and kept in out
    assert len({row["text"] for row in rows}) == 1 and rows[0]["text"] in out
    (work / "moving.txt").write_text("w1 w2 w3. " + (work / "text.txt").read_text())
    code, _, err = run(*words, "--target-sparsity", "0.2", "0.4")
    assert code == 2
    assert f"trained-0.2 was begun on the text {kept}, and the same source is" in err
    assert not (work / "moved" / "trained-0.4").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "unknown recipe 'nope'"),
        (["fitted.yaml", "--target-sparsity", "1.5"], "target_sparsity is 1.5, but must be"),
        (["fitted.yaml", "--baselines", "wanda"], "invalid choice: 'wanda'"),
    ],
)
def test_mistakes(run: Run, recipes: list[str], work: Path, words: list[str], message: str) -> None:
    code, out, err = run("compare", *words, "--output", "never", *COMPARE)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not (work / "never").exists()


def test_a_sweep_is_one_row_a_setting(run: Run, work: Path) -> None:
    before = {file: file.read_bytes() for file in (work / "out").iterdir() if file.is_file()}
    donor, control, *points = rows_of(run, "out", "--sweep", "0.2", "0.5", "0.8")
    assert (donor["role"], control["role"]) == ("donor", "control")
    assert [point["setting"] for point in points] == [{"tau": tau} for tau in (0.2, 0.5, 0.8)]
    sparsities = [point["ffn_sparsity"] for point in points]
    assert sparsities == sorted(sparsities) and sparsities[0] < sparsities[-1]
    *_, saved = rows_of(run, "out")  # whose tau is 0.5
    assert points[1]["perplexity"] == saved["perplexity"]
    assert before == {file: file.read_bytes() for file in before}


def test_a_folder_with_thresholds_is_swept_without_its_text(run: Run, work: Path) -> None:
    convert = ("convert", "--method", "teal", "--model", "donor", "--data", "text.txt")
    sizes = ("--block-length", "16", "--eval-tokens", "0", "--target-sparsity", "0.3")
    assert run(*convert, *sizes, "--output", "teal")[0] == 0
    donor, *points = rows_of(run, "teal", "--sweep", "0", "0.3", "0.9")
    assert [point["setting"] for point in points] == [{"inputs": s} for s in (0.0, 0.3, 0.9)]
    # the folder is in bf16
    assert points[0]["perplexity"] == pytest.approx(donor["perplexity"], rel=1e-3)
    *_, saved = rows_of(run, "teal")
    assert points[1]["perplexity"] == pytest.approx(saved["perplexity"], rel=1e-6)
    assert points[2]["perplexity"] != points[0]["perplexity"]


def test_one_folder_works_at_the_sparsities_that_are_asked(run: Run, work: Path) -> None:
    convert = ("convert", "--method", "lte_thresholds", "--model", "donor", "--data", "text.txt")
    sizes = ("--block-length", "16", "--eval-tokens", "0", "--tokens", "256")
    assert run(*convert, *sizes, "--expert-size", "2", "--output", "one")[0] == 0
    _, low, high = rows_of(run, "one", "--operate", "0.2", "0.6")
    assert [point["setting"] for point in (low, high)] == [{"sparsity": 0.2}, {"sparsity": 0.6}]
    for point, asked in ((low, 0.2), (high, 0.6)):
        assert point["ffn_sparsity"] == pytest.approx(asked, abs=0.06)
    assert low["ffn_share"] > 1.5 * high["ffn_share"]
    *_, bar = rows_of(run, "one", "--operate", "0.2", "--baselines", "int8")
    assert "int8" in bar["model"]
    teal = ("convert", "--method", "teal", "--model", "donor", "--data", "text.txt", *sizes[:4])
    assert run(*teal, "--target-sparsity", "0.3", "--output", "dropped")[0] == 0
    by_inputs = rows_of(run, "dropped", "--sweep", "0.5")[1]
    assert rows_of(run, "dropped", "--operate", "0.5")[1]["perplexity"] == by_inputs["perplexity"]


def test_several_folders_are_swept_beside_one_donor(run: Run, work: Path) -> None:
    shutil.copytree(work / "out", work / "copy")
    donor, *rest = rows_of(run, "out", "copy", "--sweep", "0.2", "0.5")
    points = [row for row in rest if row["role"] == "model"]
    assert donor["role"] == "donor"
    assert [point["setting"]["tau"] for point in points] == [0.2, 0.5, 0.2, 0.5]
    assert [point["model"] for point in points] == ["out", "out", "copy", "copy"]
    assert points[1]["perplexity"] == points[3]["perplexity"]


def test_seeds_are_compared_by_their_mean_and_range(
    run: Run, recipes: list[str], work: Path
) -> None:
    words = ("--output", "repeated", *COMPARE, "--target-sparsity", "0.4", "--seed", "3", "5")
    words += ("--baselines", "cats")  # of one budget on one control, which is no repeat
    code, out, err = run("compare", "trained.yaml", *words)
    assert code == 0, err
    rows = json.loads((work / "repeated" / "table.json").read_text())
    *runs, bar = [row for row in rows if row["role"] == "model"]
    assert bar["series"] == "CATS" and bar["seed"] is None
    assert [row["model"] for row in runs] == ["repeated/trained-0.4-3", "repeated/trained-0.4-5"]
    assert [row["seed"] for row in runs] == [3, 5]
    assert runs[0]["but_seed"] == runs[1]["but_seed"] != ""
    assert runs[0]["run_text"] != runs[1]["run_text"]  # the seed orders the training text
    controls = [row["model"] for row in rows if row["role"] == "control"]
    assert controls == [f"{row['model']}/control" for row in runs]
    mean = sum(row["perplexity"] for row in runs) / 2
    summary = out[out.rindex("trained-0.4 ") :]
    assert "3, 5" in summary and f"{mean:.2f} (" in summary
    assert "mean (least to most) over seeds" in summary


def test_a_sweep_without_values_and_a_picture(run: Run, work: Path) -> None:
    code, out, _ = run("evaluate", "out", *EVALUATE, "--sweep", "--plot", "curve.png")
    assert code == 0 and "tau 0.1" in out and "tau 0.9" in out
    assert (work / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "donor", "--sweep"], "donor has no router and no threshold"),
        (["out", "donor", "--card"], "--card takes one folder, not 2"),
        (["out", "--operate", "1.5"], "target_sparsity is 1.5, but must be strictly between"),
        (["out", "--operate", "0.5", "--sweep"], "--sweep and --operate both say"),
        (["donor", "--operate", "0.5"], "donor has no router and no threshold"),
        (["donor", "--sweep"], "donor has no router and no threshold: there is nothing to sweep"),
        (["out", "--plot", "curve.txt"], "'curve.txt' is no picture: use .png, .svg, .pdf"),
    ],
)
def test_sweep_mistakes(run: Run, words: list[str], message: str) -> None:
    code, out, err = run("evaluate", *words, *EVALUATE)
    assert (code, out) == (2, "") and message in err


def test_loading_a_swept_folder_finds_its_own_setting(run: Run, work: Path) -> None:
    rows_of(run, "out", "--sweep", "0.9")
    assert {ffn.selector.tau for ffn in expert_ffns(load(work / "out"))} == {0.5}
