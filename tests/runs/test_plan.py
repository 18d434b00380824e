"""Every shipped recipe on the model that it is for, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.recipe import (
    Attach,
    Fit,
    Lora,
    Recipe,
    Split,
    Train,
    known_recipes,
    read_recipe,
)
from moe_tools.runs.plan import Machine, Plan, plan
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
    assert found.tokens == recipe.counted().train_tokens()
    assert [step.verb for step in found.steps] == [step.verb for step in recipe.steps]
    trained = max((step.trained for step in found.steps), default=0)
    (source,) = found.data
    assert source.name == recipe.data and source.tokens >= (recipe.epoch_tokens or found.tokens)
    steps = [step for step in recipe.steps if isinstance(step, Train) and step.amount]
    if any(step.parts == "all" for step in steps):
        assert trained >= found.parameters
        assert found.memory["1"]["0"] >= ADAM * found.parameters
        assert found.memory["64"]["3"] < found.memory["64"]["0"]
        assert found.hours > 0 and found.checkpoints >= 3 * 14 * found.parameters


def states(found: Plan, stage: int, processes: int) -> float:
    """Bytes of the states in the hungriest train step."""
    held = [step.states for step in found.steps if step.states is not None]
    return max(one.per_process(stage, processes) for one in held)


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
    mine, theirs = (states(found, 3, 8) for found in (taught, plain))
    assert mine - theirs == 2 * plain.parameters
    logits = 2 * 4 * 512 * 49152 + 2 * 4 * 128 * 49152  # the teacher's, and two tensors in fp32
    assert taught.memory["8"]["3"] - plain.memory["8"]["3"] == mine - theirs + logits


def test_recomputing_costs_a_forward_pass(models: Path) -> None:
    model = str(models / "smollm2-135m")
    plain, recomputed = (
        plan(Recipe("x", (Train(tokens=1024, checkpointing=again),)), model)
        for again in (False, True)
    )
    assert recomputed.steps[0].flops == pytest.approx(plain.steps[0].flops * 4 / 3)
    assert recomputed.hours == pytest.approx(plain.hours * 4 / 3)
    assert recomputed.steps[0].activations == plain.steps[0].recomputed
    assert plain.steps[0].recomputed < plain.steps[0].activations / 8  # 30 layers
    assert recomputed.memory["1"]["2"] == plain.needs[2].gpu_recomputed < plain.needs[2].gpu


EPOCHS = {"lte_llama2_7b": (103_227_021, 5), "lte_gpt2_medium": (103_227_021, 5)}
EPOCHS |= {"lte_roberta_base": (2_155_168, 5), "moefication_bert_large": (2_155_168, 3)}


@pytest.mark.parametrize("name", EPOCHS)
def test_epochs_are_counted_and_their_text_is_there_once(name: str, models: Path) -> None:
    recipe, (once, epochs) = read_recipe(known_recipes()[name]), EPOCHS[name]
    assert recipe.epochs == epochs and not recipe.train_tokens()
    found = plan(recipe, str(models / OF_RECIPE[name]))
    assert found.tokens == epochs * once
    assert found.data[0].tokens == once


@pytest.mark.parametrize(("vocabulary", "each"), [(65_536, 2), (65_537, 4)])
def test_ids_of_a_large_vocabulary_take_twice_the_disk(
    vocabulary: int, each: int, models: Path, tmp_path: Path
) -> None:
    config, _ = CONFIGS["smollm2-135m"]
    changed = type(config)(**{**config.to_dict(), "vocab_size": vocabulary})
    changed.save_pretrained(tmp_path)
    recipe = Recipe("x", (Train(tokens=10**9),), data="owner/name")
    assert plan(recipe, str(tmp_path)).data[0].disk == each * 10**9
    few = Recipe("x", (Train(tokens=10**6),), data="owner/name")
    assert plan(few, str(tmp_path)).data[0].disk == 0  # it stays in memory


def test_adapters_are_counted_as_peft_makes_them(models: Path) -> None:
    lora = Lora(rank=8)
    whole, low = (
        plan(Recipe("x", (Train(tokens=1024, lora=one),)), str(models / "smollm2-135m"))
        for one in (None, lora)
    )
    sides = [576 + 576, 576 + 192, 576 + 192, 576 + 576, *[576 + 1536] * 3]
    assert low.steps[0].trained == 8 * 30 * sum(sides)
    held = low.steps[0].states
    assert held is not None and held.weights == 2 * (low.parameters + low.steps[0].trained)
    assert (held.gradients, held.optimizer) == (
        2 * low.steps[0].trained,
        12 * low.steps[0].trained,
    )
    assert low.needs[0].gpu < whole.needs[0].gpu - 13 * whole.parameters
    assert low.checkpoints == 3 * (held.weights + held.optimizer)


def test_a_plan_is_laid_on_a_machine(models: Path) -> None:
    recipe, model = read_recipe(known_recipes()["prosparse_7b"]), str(models / "llama2-7b")
    node = plan(recipe, model, machine=Machine("a100-80", 8, mfu=0.5))
    assert node.machine.gpu == "A100-80GB"
    assert node.hours == pytest.approx(node.flops / (8 * 312e12 * 0.5) / 3600)
    assert node.step_seconds == pytest.approx(3600 * node.hours / 2062)
    by_way = {need.way: need for need in node.needs}
    held, step = node.steps[1].states, node.steps[1]
    assert held is not None and step.passes == 128
    parameters = node.parameters
    assert by_way["0"].host == 0 and by_way["1"].host == 8 * 2 * parameters
    assert by_way["2_offload"].host == pytest.approx(16 * parameters)  # of 8, all in one node
    assert by_way["3_offload"].host == pytest.approx(18 * parameters)
    assert by_way["0"].sent == pytest.approx(2 * 4 * parameters * 7 / 8)  # sums in fp32
    assert by_way["1"].sent == pytest.approx(2 * 2 * parameters * 7 / 8)
    assert by_way["2"].sent == pytest.approx((128 + 1) * 2 * parameters * 7 / 8)
    assert by_way["3"].sent == pytest.approx(128 * 3 * 2 * parameters * 7 / 8)
    assert by_way["1"].sending == pytest.approx(by_way["1"].sent / 300e9)
    assert not by_way["2"].fits and by_way["2"].fits_recomputed
    assert by_way["2"].gpu > 0.9 * 80e9 > by_way["2"].gpu_recomputed
    nodes = plan(recipe, model, machine=Machine("A100-80GB", 64, mfu=0.5, network=400))
    assert nodes.hours == pytest.approx(node.hours / 8)
    (one,) = [need for need in nodes.needs if need.way == "1"]
    assert one.sending == pytest.approx(one.sent / 50e9)  # of 400 Gbit/s
    assert one.host == by_way["1"].host  # a node has 8 of the 64
    assert nodes.memory["64"]["2"] == next(need.gpu for need in nodes.needs if need.way == "2")


def test_what_trains_nothing_takes_no_time(models: Path) -> None:
    found = plan(read_recipe(known_recipes()["moefication_t5_large"]), str(models / "t5-large"))
    assert (found.hours, found.needs, found.checkpoints) == (0, (), 0)
    assert found.folder > 2 * found.parameters  # routers, too


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"gpu": "H100", "processes": 0}, "give at least 1"),
        ({"mfu": 1.5}, "mfu is 1.5, but must be above 0 and at most 1"),
        ({"mfu": 0.0}, "mfu is 0.0"),
        ({"network": 0.0}, "network is 0.0 Gbit/s"),
        ({"gpu": "A100"}, "may be A100-40GB or A100-80GB: say which"),
        ({"gpu": "H10O"}, "unknown card 'H10O' .known: A100-40GB, A100-80GB"),
    ],
)
def test_no_such_machine(machine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Machine(**machine)


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
    assert states(found, 0, 1) == 2 * found.parameters + 4 * routers + 12 * routers


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
