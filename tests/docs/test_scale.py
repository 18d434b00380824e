"""The tables of docs/scale.md are what the code says; the plan beside runs that were published."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_tools.recipe import known_recipes, read_recipe
from moe_tools.runs.plan import MFU, Machine, plan
from tests.docs.scale_tables import PAGE, PUBLISHED, planned, tables, utilisation, written
from tests.published import CONFIGS

TRUSTED = [name for name in PUBLISHED if name != "ProSparse-7B"]
"""Whose hours their authors print."""


@pytest.mark.slow
def test_the_tables_are_what_the_code_says() -> None:
    page, made = written(PAGE.read_text(encoding="utf-8")), tables()
    assert page.keys() == made.keys()
    for name, lines in made.items():
        assert page[name].splitlines() == lines.splitlines(), (
            "docs/scale.md is older than the code: python -m tests.docs.scale_tables"
        )
    papers = [name for name, file in known_recipes().items() if Path(file).parent.name == "papers"]
    assert all(f"`{name}`" in page["recipes"] for name in papers) and len(papers) > 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_six_a_parameter_and_token_and_attention(name: str, tmp_path: Path) -> None:
    run = PUBLISHED[name]
    found = planned(run, tmp_path)
    six = 6 * found.parameters * run.tokens
    assert six < found.flops < 1.09 * six


def test_published_runs_imply_utilisations_around_ours(tmp_path: Path) -> None:
    shares = {
        name: utilisation(PUBLISHED[name], planned(PUBLISHED[name], tmp_path / name).flops)
        for name in PUBLISHED
    }
    told = sorted(shares[name] for name in TRUSTED)
    assert 0.1 < told[0] < MFU < told[1] <= told[-1] < 0.6  # the lowest is on an H100
    assert shares["ProSparse-7B"] > told[-1] + 0.1  # ten days on 8 A100 is hard to believe


def test_cmoe_is_done_within_an_hour_on_one_card(tmp_path: Path) -> None:
    CONFIGS["llama2-7b"][0].save_pretrained(tmp_path)
    recipe = read_recipe(known_recipes()["cmoe_llama2_7b"])
    found = plan(recipe, str(tmp_path), machine=Machine("A100-80GB"))
    assert 0.1 < found.hours < 1
