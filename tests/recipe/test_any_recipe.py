"""No recipe that can be written stops in any other way than by a line that says what is wrong.

And what is wrong shows at once: a recipe that passes its rehearsal runs to its end.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.recipe import Recipe
from moe_tools.recipe.reading import parse_recipe
from moe_tools.runs.run import run
from tests.families import build
from tests.recipe.any_recipe import recipes
from tests.tiny import build_tokenizer, write_passages

FAMILIES = ("llama", "opt", "gpt2", "mixtral")
"""Gated and not, with and without exact zeros, with experts."""
FROM_THE_TEXT = ("calibration token", "max_error", "too few", "max error", "of the energy")
FROM_THE_TEXT += ("neither tokens nor epochs",)
"""What only the text, or a run that begins, can show is wrong."""


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("donors")
    for family in FAMILIES:
        own = {"mlp_bias": False} if family == "llama" else {}
        save(build(family, **own), folder / family, build_tokenizer())
    write_passages(folder / "text.txt", 100)
    logging.disable(logging.WARNING)
    yield folder
    logging.disable(logging.NOTSET)


def parsed(block: dict[str, Any], text: Path) -> Recipe:
    """The recipe, if it can be read; most mistakes are found there."""
    try:
        return parse_recipe({**block, "data": str(text), "block_length": 16})
    except ValueError:
        assume(False)
        raise


def refusal(recipe: Recipe, donor: Path, device: str) -> str:
    """Why a recipe is refused before it begins; empty: it is not."""
    try:
        with torch.device(device):
            recipe.rehearse(load(donor, dtype=torch.float32, device=device), str(donor))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(block=recipes())
def test_without_weights_it_is_refused_for_the_same_reason(
    family: str, block: dict[str, Any], donors: Path
) -> None:
    recipe = parsed(block, donors / "text.txt")
    without = refusal(recipe, donors / family, "meta")
    assert without == refusal(recipe, donors / family, "cpu")
    assert "\n" not in without


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(block=recipes())
def test_what_passes_its_rehearsal_runs(
    family: str, block: dict[str, Any], donors: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = parsed(block, donors / "text.txt")
    assume(not refusal(recipe, donors / family, "meta"))
    output = tmp_path_factory.mktemp("run") / "out"
    try:
        run(recipe, str(donors / family), output, dtype=torch.float32)
        load(output)
    except FloatingPointError:
        pass
    except ValueError as error:
        assert any(known in str(error) for known in FROM_THE_TEXT), str(error)
    finally:
        shutil.rmtree(output.parent)
