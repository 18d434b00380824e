from __future__ import annotations

from pathlib import Path

import pytest

from moe_tools.cli.main import main
from moe_tools.recipe import known_recipes, read_recipe, recipe_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lte.yaml").write_text("# LTE (arXiv 2402.06126).\n#\n# More.\nname: lte\n")
    (tmp_path / "bare.yaml").write_text("name: bare\n")
    (tmp_path / "readme.md").write_text("no recipe")
    monkeypatch.setattr("moe_tools.recipe.files.files", lambda package: tmp_path)
    return tmp_path


def test_the_list_has_names_and_first_comments(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == "bare\nlte   LTE (arXiv 2402.06126).\n"


def test_a_name_prints_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "lte"]) == 0
    assert capsys.readouterr().out == (folder / "lte.yaml").read_text()


def test_a_wrong_name_gets_a_suggestion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "let"]) == 2
    expected = "moe-tools: unknown recipe 'let'; did you mean 'lte'? (known: bare, lte)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("name", known_recipes())
def test_what_comes_with_moe_tools_can_be_read(name: str) -> None:
    assert read_recipe(recipe_path(name)).steps
