"""`grid`: every split with every router on a tiny llama, resumed, and never over another grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_tools.lock import locked
from tests.tiny import Run

GRID = (
    *("--model", "donor", "--data", "text.txt", "--expert-size", "8", "--dtype", "fp32"),
    *("--tokens", "256", "--fit-tokens", "1024", "--block-length", "16"),
)
ROUTERS = ("oracle", "ridge", "similarity", "mlp")


def grid(run: Run, *words: str) -> list[dict[str, Any]]:
    code, out, err = run("grid", *GRID, *words, "--json", "-")
    assert code == 0, err
    return json.loads(out)


def test_every_combination_has_a_line(run: Run, work: Path) -> None:
    words = ("--output", "all.jsonl", "--splits", "random", "kmeans:marks")
    routers = ("--routers", *ROUTERS, "--target-sparsity", "0.5")
    donor, *cells = grid(run, *words, *routers, "--baselines", "cats")
    assert (donor["router"], donor["sparsity"], donor["ffn_share"]) == ("dense", 0.0, 1.0)
    assert [(cell["split"], cell["router"]) for cell in cells] == [
        ("-", "cats"),
        *[(split, router) for split in ("random", "kmeans:marks") for router in ROUTERS],
    ]
    for cell in cells:
        assert cell["sparsity"] == pytest.approx(0.5, abs=0.05)
    for oracle, *others in (cells[1:5], cells[5:]):
        assert oracle["recall"] > 0.95  # the cache rounds to bf16
        assert all(other["captured"] < oracle["captured"] for other in others)


def test_a_grid_goes_on_where_it_was_cut(run: Run, work: Path) -> None:
    words = ("--output", "cut.jsonl", "--splits", "random", "--routers", "oracle", "ridge")
    cells = grid(run, *words, "--target-sparsity", "0.25", "0.5")
    file = work / "cut.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3][:20]]) + "\n")
    again = grid(run, *words, "--target-sparsity", "0.25", "0.5")
    assert again == cells
    assert file.read_text().splitlines()[:3] == lines[:3]
    more = grid(run, *words, "--target-sparsity", "0.25", "0.75")
    assert more[0] == cells[0] and more[1] == cells[1]


@pytest.mark.parametrize("kept", [0, 20, "head", -20])
def test_a_file_that_a_full_disk_cut_is_gone_on_with(run: Run, work: Path, kept: int | str) -> None:
    """In its head or in a figure, without an end of line: nothing is glued to it."""
    words = ("--splits", "random", "--routers", "oracle", "--target-sparsity", "0.5")
    cells = grid(run, "--output", "whole.jsonl", *words)
    whole = (work / "whole.jsonl").read_text()
    end = len(whole.split("\n")[0]) if isinstance(kept, str) else kept
    (work / "short.jsonl").write_text(whole[:end])
    assert grid(run, "--output", "short.jsonl", *words) == cells
    assert (work / "short.jsonl").read_text() == whole


@pytest.mark.parametrize("text", ["my notes", "my notes\n\nand no end"])
def test_a_file_that_is_no_grid_is_left_alone(run: Run, work: Path, text: str) -> None:
    (work / "notes.txt").write_text(text)
    code, _, err = run("grid", *GRID, "--output", "notes.txt", "--splits", "random")
    assert code == 2 and "notes.txt holds another grid" in err
    assert (work / "notes.txt").read_text() == text


def test_two_grids_do_not_write_one_file(run: Run, work: Path) -> None:
    with locked(work / "two.jsonl"):
        code, _, err = run("grid", *GRID, "--output", "two.jsonl", "--splits", "random")
    assert code == 2 and "two.jsonl is being written by another process: wait" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--splits", "kmean"], "unknown value 'kmean'; did you mean 'kmeans'?"),
        (["--routers", "mpl"], "unknown router 'mpl'; did you mean 'mlp'?"),
        (["--target-sparsity", "2"], "target sparsity is 2.0, but must be strictly between"),
    ],
)
def test_mistakes(run: Run, work: Path, words: list[str], message: str) -> None:
    code, out, err = run("grid", *GRID, "--output", "wrong.jsonl", *words)
    assert (code, out) == (2, "") and message in err
    assert not (work / "wrong.jsonl").exists()


@pytest.mark.parametrize("part", ["text", "run_text"])
def test_figures_of_another_text_are_not_mixed_in(run: Run, work: Path, part: str) -> None:
    words = ("--output", f"{part}.jsonl", "--splits", "random", "--routers", "oracle")
    cells = grid(run, *words, "--target-sparsity", "0.5")
    assert len({(cell["text"], cell["run_text"]) for cell in cells}) == 1
    file = work / f"{part}.jsonl"
    file.write_text(file.read_text().replace(cells[0][part], "0" * 16))
    before = file.read_text()
    code, _, err = run("grid", *GRID, *words, "--target-sparsity", "0.5", "0.75")
    name = {"text": "held-out", "run_text": "training"}[part]
    said = err.splitlines()[-1]  # the line before says that the text is short
    assert code == 2 and f"{part}.jsonl holds figures of the {name} text {'0' * 16}, and" in said
    assert file.read_text() == before


def test_another_grid_is_not_mixed_in(run: Run, work: Path) -> None:
    words = ("--output", "mine.jsonl", "--splits", "random", "--routers", "oracle")
    grid(run, *words, "--target-sparsity", "0.5")
    code, _, err = run("grid", *GRID, *words, "--when-off", "mean")
    assert code == 2 and "mine.jsonl holds another grid" in err
