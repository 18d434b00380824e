"""Runs that differ in their seed alone."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_tools.report.plot import plot
from moe_tools.report.repeats import made_by, print_repeats, repeats
from moe_tools.report.report import Row
from tests.report.test_report import DENSE, ROW

RUN = replace(ROW, method="lte", recipe="a1", seed=0)


def of_seeds(perplexities: list[float]) -> list[Row]:
    return [
        replace(RUN, model=f"out/{seed}", seed=seed, perplexity=value)
        for seed, value in enumerate(perplexities)
    ]


@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=6))
def test_the_mean_lies_between_the_least_and_the_most(perplexities: list[float]) -> None:
    (group,) = repeats([DENSE, *of_seeds(perplexities)])
    spread = group.spread(lambda row: row.perplexity)
    assert spread is not None
    mean, least, most = spread
    assert (least, most) == (min(perplexities), max(perplexities))
    assert least <= mean * (1 + 1e-12) and mean <= most * (1 + 1e-12)
    assert mean == pytest.approx(sum(perplexities) / len(perplexities))
    assert group.seeds == list(range(len(perplexities)))


@pytest.mark.parametrize(
    "other",
    [
        replace(RUN, seed=1, recipe="b2"),  # another recipe, or donor
        replace(RUN, seed=1, setting={"tau": 0.5}),
        replace(RUN, seed=1, role="control"),
        RUN,  # the same run twice
        replace(RUN, seed=None),
        replace(RUN, seed=1, recipe=""),
    ],
)
def test_what_differs_in_more_than_its_seed_is_no_repeat(other: Row) -> None:
    assert repeats([RUN, other]) == []


def test_the_table_has_means_and_ranges() -> None:
    shown = io.StringIO()
    print_repeats([DENSE, *of_seeds([20.0, 21.0, 22.6])], shown)
    assert "21.20 (20.00 to 22.60)" in shown.getvalue() and "0, 1, 2" in shown.getvalue()
    assert "1.052 " in shown.getvalue()  # the ratio to the control, of all alike
    assert "/ donor" not in shown.getvalue()  # none has one
    nothing = io.StringIO()
    print_repeats([DENSE, RUN], nothing)
    assert nothing.getvalue() == ""


def test_a_run_is_told_by_its_recipe_without_the_seed(tmp_path: Path) -> None:
    head = "# text: {text}\n# weights: {weights}\n# donor: {donor}\nname: lte\nseed: {seed}\n"
    plain = {"text": "t0", "weights": "w0", "donor": "/a", "seed": 0}
    made = []
    for change in ({}, {"seed": 1, "text": "t1"}, {"donor": "/b"}, {"weights": "w1"}):
        (tmp_path / "recipe.yaml").write_text(head.format(**plain | change))
        made.append(made_by(str(tmp_path)))
    first, seeded, moved, another = made
    assert (first["method"], first["seed"], seeded["seed"]) == ("lte", 0, 1)
    assert first["recipe"] == seeded["recipe"] == moved["recipe"] != another["recipe"]
    (tmp_path / "recipe.yaml").write_text("[no, recipe")
    assert made_by(str(tmp_path)) == {} == made_by(str(tmp_path / "nowhere"))


def test_a_picture_has_one_point_of_all_seeds(tmp_path: Path) -> None:
    rows = [replace(row, ratio_to_donor=row.perplexity) for row in of_seeds([1.1, 1.2])]
    plot([DENSE, *rows], tmp_path / "seeds.svg")
    text = (tmp_path / "seeds.svg").read_text()
    assert "<!-- lte -->" in text and "out/0" not in text
    plot([DENSE, rows[0]], tmp_path / "one.svg")
    assert "<!-- out/0 -->" in (tmp_path / "one.svg").read_text()
