"""Runs that differ in their seed alone."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_tools.report.plot import plot
from moe_tools.report.repeats import print_repeats, repeats
from moe_tools.report.report import Row
from tests.report.test_report import DENSE, ROW

RUN = replace(ROW, method="lte", but_seed="a1", seed=0)


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
        replace(RUN, seed=1, but_seed="b2"),  # another recipe, or donor
        replace(RUN, seed=1, setting={"tau": 0.5}),
        replace(RUN, seed=1, role="control"),
        RUN,  # the same run twice
        replace(RUN, seed=None),
        replace(RUN, seed=1, but_seed=""),
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


def test_equal_runs_have_a_point_without_a_bar(tmp_path: Path) -> None:
    """The mean of equal numbers may lie beside them: 0.003, three times."""
    rows = [replace(row, ratio_to_donor=0.003) for row in of_seeds([0.003] * 3)]
    plot([DENSE, *rows], tmp_path / "same.svg")
    (group,) = repeats(rows)
    assert group.spread(lambda row: row.perplexity) == (0.003, 0.003, 0.003)


def test_groups_of_one_method_have_names_of_their_own() -> None:
    half = [replace(row, model=f"runs/lte-0.5-{row.seed}") for row in of_seeds([20.0, 21.0])]
    most = [
        replace(row, model=f"runs/lte-0.7-{row.seed}", but_seed="b2")
        for row in of_seeds([30.0, 31.0])
    ]
    assert [group.name for group in repeats(half + most)] == ["lte-0.5", "lte-0.7"]
    assert [
        group.name for group in repeats([replace(row, setting={"tau": 0.5}) for row in half])
    ] == ["lte-0.5, tau 0.5"]
    (unlike,) = repeats([replace(half[0], model="a"), replace(half[1], model="b")])
    assert unlike.name == "lte"


def test_a_picture_has_one_point_of_all_seeds(tmp_path: Path) -> None:
    rows = [replace(row, ratio_to_donor=row.perplexity) for row in of_seeds([1.1, 1.2])]
    plot([DENSE, *rows], tmp_path / "seeds.svg")
    text = (tmp_path / "seeds.svg").read_text()
    assert "<!-- out -->" in text and "out/0" not in text
    plot([DENSE, rows[0]], tmp_path / "one.svg")
    assert "<!-- out/0 -->" in (tmp_path / "one.svg").read_text()
