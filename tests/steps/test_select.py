"""The step `select`, which is the last one of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import read_conversion
from moe_tools.inference.prompt_ffn import prompt_ffns
from moe_tools.recipe import read_recipe
from moe_tools.recipe.files import known_recipes
from moe_tools.recipe.options import with_options
from moe_tools.recipe.reading import parse_recipe
from moe_tools.runs.run import convert, run
from tests.families import build, host_tensors
from tests.tiny import build_tokenizer, write_passages


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    save(build("llama"), tmp_path / "donor", build_tokenizer())
    write_passages(tmp_path / "text.txt", 50)
    return tmp_path / "donor"


@pytest.mark.parametrize("stream", [False, True])
def test_the_recipe_changes_nothing_but_the_config(
    donor: Path, stream: bool, tmp_path: Path
) -> None:
    out = convert(
        str(donor),
        tmp_path / "out",
        method="griffin",
        target_sparsity=0.75,
        data=str(tmp_path / "text.txt"),
        dtype=torch.float32,
        stream=stream,
    )
    model, before = load(out), host_tensors(load(donor))
    assert read_conversion(model).prompt_share == 0.25  # type: ignore[union-attr]
    assert [ffn.share for ffn in prompt_ffns(model)] == [0.25, 0.25]
    after = host_tensors(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_something_stays(sparsity: float) -> None:
    recipe = read_recipe(known_recipes()["griffin"])
    with pytest.raises(ValueError, match=r"select: target_sparsity is .*, but must be in \[0, 1\)"):
        with_options(recipe, target_sparsity=sparsity)


@pytest.mark.parametrize("share", [0, 1.1, -1])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    block = {"name": "any", "steps": [{"select": {"share": share}}]}
    with pytest.raises(ValueError, match=r"select: share is .*, but must be above 0 and at most 1"):
        parse_recipe(block)


LATER = [
    {"train": {"tokens": 64}},
    {"swap": {"activation": {"kind": "relu"}}},
    {"split": {}},
    {"select": {}},
]


@pytest.mark.parametrize("later", LATER, ids=lambda step: next(iter(step)))
def test_nothing_follows_it(later: dict[str, object], donor: Path, tmp_path: Path) -> None:
    """Neither in a recipe nor on its folder, and nothing is written before that is said."""
    block = {"name": "any", "steps": [{"select": {}}, later], "data": str(tmp_path / "text.txt")}
    with pytest.raises(ValueError, match="`select` is the last step"):
        run(parse_recipe(block), str(donor), tmp_path / "both")
    assert not (tmp_path / "both").exists()
    alone = parse_recipe({**block, "steps": [{"select": {}}]})
    run(alone, str(donor), tmp_path / "out", dtype=torch.float32)
    on_its_folder = parse_recipe({**block, "steps": [later]})
    with pytest.raises(ValueError, match="by the prompt") as error:
        run(on_its_folder, str(tmp_path / "out"), tmp_path / "more")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "more").exists()


def test_encoders_have_no_prompt(tmp_path: Path) -> None:
    save(build("bert"), tmp_path / "bert", build_tokenizer())
    recipe = read_recipe(known_recipes()["griffin"])
    with pytest.raises(ValueError, match="BertForMaskedLM continues no text"):
        run(recipe, str(tmp_path / "bert"), tmp_path / "out")
