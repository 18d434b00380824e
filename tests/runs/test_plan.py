"""Every shipped recipe on the model that it is for, from its configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.recipe import (
    Attach,
    Fit,
    Recipe,
    Split,
    Train,
    known_recipes,
    read_recipe,
)
from moe_tools.runs.plan import plan
from moe_tools.steps.fit import fit
from tests.families import EXPERT_SIZE, build
from tests.published import CONFIGS, OF_RECIPE

ADAM = 2 + 2 + 12
"""Bytes of a parameter that is trained in bf16."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config.json for each of the papers' models."""
    folder = tmp_path_factory.mktemp("models")
    for name, (config, _) in CONFIGS.items():
        config.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", known_recipes())
def test_a_shipped_recipe_can_be_run_on_its_model(name: str, models: Path) -> None:
    recipe = read_recipe(known_recipes()[name])
    model = OF_RECIPE.get(name, "smollm2-135m")
    found = plan(recipe, str(models / model))
    assert found.parameters == CONFIGS[model][1]
    assert found.tokens == recipe.train_tokens()
    assert [step.verb for step in found.steps] == [step.verb for step in recipe.steps]
    trained = max((step.trained for step in found.steps), default=0)
    (source,) = found.data
    assert source.name == recipe.data and source.tokens >= found.tokens
    if any(isinstance(step, Train) and step.parts == "all" for step in recipe.steps):
        assert trained >= found.parameters
        assert found.memory["1"]["0"] >= ADAM * found.parameters
        assert found.memory["64"]["3"] < found.memory["64"]["0"] / 5  # a teacher is not divided


STEPS = {"prosparse_7b": 16_500, "prosparse_13b": 16_000, "prosparse_1b": 35_000}
STEPS |= {"d2dmoe_gpt2": 1000, "d2dmoe_gemma_2b": 1000, "cmoe_llama2_7b": 1024}
STEPS |= {"turbosparse_mistral_7b": 17_881}


@pytest.mark.parametrize("name", STEPS)
def test_optimizer_steps_are_those_of_the_paper(name: str, models: Path) -> None:
    recipe, model = read_recipe(known_recipes()[name]), str(models / OF_RECIPE[name])
    assert plan(recipe, model).to_dict()["optimizer_steps"] == STEPS[name]
    alone = [step.optimizer_steps for step in plan(recipe, model).steps]
    eight = [step.optimizer_steps for step in plan(recipe, model, processes=8).steps]
    assert eight == [steps // 8 for steps in alone]


def test_flops_are_six_a_parameter_and_token(models: Path) -> None:
    found = plan(read_recipe(known_recipes()["prosparse_7b"]), str(models / "llama2-7b"))
    six = 6 * found.parameters * found.tokens
    assert found.to_dict()["flops"] == pytest.approx(six, rel=0.1)  # attention; no embeddings


def test_a_teacher_costs_its_weights_and_a_forward_pass(models: Path) -> None:
    model = str(models / "smollm2-135m")
    plain, taught = (
        plan(Recipe("x", (Train(tokens=1024, losses=losses),)), model)
        for losses in ({"lm": 1.0}, {"lm": 0.5, "distill": 0.5})
    )
    assert taught.steps[0].flops == pytest.approx(plain.steps[0].flops * 4 / 3)
    assert taught.memory["8"]["3"] - plain.memory["8"]["3"] == 2 * plain.parameters


def test_recomputing_costs_a_forward_pass(models: Path) -> None:
    model = str(models / "smollm2-135m")
    plain, recomputed = (
        plan(Recipe("x", (Train(tokens=1024, checkpointing=again),)), model)
        for again in (False, True)
    )
    assert recomputed.steps[0].flops == pytest.approx(plain.steps[0].flops * 4 / 3)


def test_mixed_text_is_named_source_by_source(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    data = f"{tmp_path / 'a.jsonl'}:3 + {tmp_path / 'b.jsonl'}:1"
    found = plan(Recipe("x", (Train(tokens=1024),), data=data), str(models / "smollm2-135m"))
    assert [(one.there, one.tokens) for one in found.data] == [(True, 768), (False, 256)]


def test_routers_alone_need_little(models: Path) -> None:
    steps = (
        Split(expert_size=32),
        Attach(),
        Train(tokens=1024, mode="straight", parts="routers"),
    )
    found = plan(Recipe("x", steps), str(models / "smollm2-135m"))
    routers = 30 * (1536 // 32) * (576 + 1)
    assert found.steps[2].trained == routers
    assert found.memory["1"]["0"] == 2 * found.parameters + 4 * routers + 12 * routers


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("router", ["low_rank", "mlp", "similarity"])
def test_the_disk_that_fit_fills(family: str, router: str, tmp_path: Path) -> None:
    donor = build(family)
    save(donor, tmp_path / "donor")
    options = {"zero_below": 0.05} if router == "low_rank" else {}  # SiLU has no exact zeros
    steps = (
        Split(expert_size=EXPERT_SIZE),
        Attach(router, router_options=options, selector={"kind": "topk", "k": 2}),
        Fit(tokens=512),
    )
    found = plan(Recipe("x", steps), str(tmp_path / "donor"))
    made = Conversion("donor", EXPERT_SIZE, router, {"kind": "topk", "k": 2})
    attach_experts(donor, made)
    fit(donor, Fit(tokens=512, epochs=1), torch.randint(3, 64, (16, 32)), tmp_path / "work")
    written = [file.stat().st_size for file in _tensors(tmp_path / "work" / "activations")]
    assert found.steps[2].disk == sum(written) > 0


def _tensors(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".json"]


def test_a_step_that_is_impossible_is_said(models: Path) -> None:
    recipe = read_recipe(known_recipes()["turbosparse"])
    with pytest.raises(ValueError, match=r"^transformer\.h\.0\.mlp has no gate, which DReLU needs"):
        plan(recipe, str(models / "gpt2"))
    with pytest.raises(
        ValueError, match=r"^T5ForConditionalGeneration is an encoder-decoder, and does"
    ):
        plan(read_recipe(known_recipes()["lte"]), str(models / "t5-large"))
    with pytest.raises(ValueError, match=r"is no encoder-decoder .*, and task: seq2seq needs one"):
        plan(Recipe("x", (Split(32),), task="seq2seq"), str(models / "smollm2-135m"))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp has 1536 neurons: experts of"):
        plan(Recipe("x", (Split(expert_size=4000),)), str(models / "smollm2-135m"))
