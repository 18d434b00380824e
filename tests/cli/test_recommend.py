"""`recommend` on a tiny llama: all methods measured, the cheapest within the loss, its commands."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_tools.checkpoint.loading import load
from moe_tools.experts.conversion import read_conversion
from moe_tools.report.report import Row
from moe_tools.runs.recommend import ON_GRID, Use, choose, methods
from tests.report.test_report import DENSE, ROW
from tests.tiny import Run

WORDS = ("--data", "text.txt", "--tokens", "256", "--block-length", "16", "--dtype", "fp32")
BUDGETS = ("--budgets", "0.3", "0.6")


def recommended(run: Run, *words: str) -> dict[str, Any]:
    code, out, err = run("recommend", "donor", *WORDS, *words, "--json", "-")
    assert code == 0, err
    return {**json.loads(out), "said": " ".join(err.split())}


def test_every_method_is_measured_and_the_cheapest_chosen(run: Run, work: Path) -> None:
    found = recommended(run, *BUDGETS, "--max-loss", "1000")
    rows = found["rows"]
    tried = [name for name in methods() if name not in ("int8", "int4")]
    assert sorted(row["model"] for row in rows) == sorted(
        ["donor", "dense int8", "dense int4", *[f"{n} at {s}" for n in tried for s in (0.3, 0.6)]]
    )
    cheapest = min(rows, key=lambda row: row["total_bytes"])
    assert found["chosen"] == cheapest
    said = found["said"]
    assert f"{cheapest['total_bytes'] / rows[0]['total_bytes']:.2f}x of the dense model's" in said
    assert "not a measured speed" in said
    limit = found["bytes_per_second"] / cheapest["total_bytes"]
    assert f"that is a limit of {limit:.0f} tokens/s" in said


@pytest.mark.parametrize("name", [*ON_GRID, "int4"])
def test_the_commands_make_what_was_measured(name: str, run: Run, work: Path) -> None:
    from moe_tools.runs.recommend import commands

    model = "dense int4" if name == "int4" else f"{name} at 0.6"
    (convert, generate), recipe = commands(replace(ROW, model=model), "donor", "text.txt")
    (work / "recipe.yaml").write_text(recipe)
    words = shlex.split(convert.replace("DIR", f"made_{name}"))[1:]
    code, _, err = run(*words, "--eval-tokens", "0", "--dtype", "fp32")
    assert code == 0, err
    conversion = read_conversion(load(f"made_{name}"))
    assert conversion is not None and conversion.weight_bits == int(name[-1])
    if name != "int4":
        assert conversion.router_options["of"] == int(name[-1])
    code, _, err = run("evaluate", f"made_{name}", *WORDS, "--json", "made.json")
    assert code == 0, err
    row = json.loads((work / "made.json").read_text())[-1]
    assert row["ffn_bytes_share"] < 0.5
    assert generate.startswith("moe-tools generate DIR")


def test_an_honest_answer_may_be_to_keep_it_dense(run: Run) -> None:
    assert choose([DENSE, replace(ROW, ratio_to_donor=1.2)], 1.05, Use("decode")) == DENSE
    int4 = replace(DENSE, model="dense int4", role="model", ratio_to_donor=1.04, total_bytes=150e6)
    assert choose([DENSE, int4, replace(ROW, ratio_to_donor=1.2)], 1.05, Use("decode")) == int4


def test_a_batch_pays_for_what_one_of_it_needs(run: Run) -> None:
    def row(model: str, one: float, together: float) -> Row:
        total = {"ffn_dense": 1.0, "ffn": 1.0, "scoring": 0.0, "total": together}
        made = replace(ROW, model=model, ratio_to_donor=1.0, total_bytes=one)
        return replace(made, together={"4": total, "16": total})

    rows = [row("sparse", 100e6, 260e6), row("dense int8", 150e6, 150e6)]
    assert choose(rows, 1.05, Use("decode")).model == "sparse"
    assert choose(rows, 1.05, Use.parse("batch:4")).model == "dense int8"
    assert choose(rows, 1.05, Use.parse("batch:1")).model == "sparse"


def test_prefill_is_dense_and_says_why(run: Run) -> None:
    code, out, _ = run("recommend", "donor", "--for", "prefill")
    assert code == 0
    assert "Keep the model dense for prefill" in out and "every weight is read once" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-loss", "0.9"), "--max-loss is 0.9, but perplexity may grow by 1 times and more"),
        (
            ("--for", "batch:5"),
            "'batch:5' is no use: decode, prefill, or batch:N with N of 1, 4, 16",
        ),
        (("--budgets", "1.0"), "a budget is 1, but must be strictly between 0 and 1"),
        (("--for", "batch:16", "--tokens", "8", "--block-length", "8"), "give more --tokens"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, run: Run) -> None:
    code, out, err = run("recommend", "donor", *WORDS, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_converted_folder_is_refused(run: Run) -> None:
    code, _, err = run("recommend", "out", *WORDS)
    assert code == 2 and "out is converted already" in err.splitlines()[-1]
