"""Recipes as data: what is read, what is refused and with which words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.recipe import (
    Attach,
    Lora,
    Recipe,
    Refit,
    Split,
    Stage,
    Swap,
    Train,
    control_recipe,
    known_recipes,
    parse_recipe,
    read_recipe,
    recipe_path,
    with_options,
)
from moe_tools.recipe.options import has_control

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
TWO_STAGES = Recipe(
    "two-stages",
    (
        Split(expert_size=4),
        Attach(),
        Train(
            tokens=300,
            mode="soft",
            target_sparsity=0.5,
            losses={"lm": 1.0, "efficiency": 0.1, "separability": 0.5},
            lr=1e-4,
        ),
        Train(tokens=100, mode="hard", losses={"lm": 1.0, "distill": 1.0}, lr=3e-4),
    ),
)


def block(**train: Any) -> dict[str, Any]:
    return {"name": "x", "steps": [{"train": {"tokens": 8, **train}}]}


def again(recipe: Recipe) -> Recipe:
    return parse_recipe(yaml.safe_load(recipe.to_yaml()))


def test_every_file_is_found_by_its_name() -> None:
    assert {name: path.resolve() for name, path in known_recipes().items()} == {
        path.stem: path for path in SHIPPED
    }
    assert list(known_recipes()) == sorted(path.stem for path in SHIPPED)


def test_there_are_recipes() -> None:
    assert "lte" in {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_read_and_written_without_loss(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert again(recipe) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_its_paper_and_its_command(path: Path) -> None:
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    words = (f"--method {path.stem} ", f"--recipe {path.relative_to(ROOT)} ")
    assert any(f"moe-tools convert {word}" in header for word in words)
    assert read_recipe(path).paper


STAGES = st.lists(
    st.builds(
        Stage,
        until=st.floats(0.01, 0.99),
        weight=st.floats(0, 10),
        curve=st.sampled_from(["sine", "constant"]),
    ),
    max_size=3,
    unique_by=lambda stage: stage.until,
).map(lambda stages: (*sorted(stages, key=lambda stage: stage.until), Stage(1.0, 0.5)))
STEPS = st.one_of(
    st.builds(
        Swap,
        activation=st.sampled_from([{"kind": "relu"}, {"kind": "fatrelu", "theta": 0.01}]),
        max_error=st.none() | st.floats(0.001, 0.999),
    ),
    st.builds(
        Split,
        expert_size=st.integers(1, 64),
        method=st.sampled_from(["kmeans", "random", "contiguous"]),
        by=st.sampled_from(["activations", "weights"]),
    ),
    st.builds(
        Attach,
        selector=st.sampled_from([{"kind": "threshold", "tau": 0.5}, {"kind": "topk", "k": 2}]),
        start=st.sampled_from(["regression", "open"]),
        start_sparsity=st.floats(0, 1, exclude_min=True, exclude_max=True),
        when_off=st.sampled_from(["zero", "mean"]),
    ),
    st.builds(
        Refit,
        ridge=st.floats(0, exclude_min=True, allow_infinity=False),
        constants=st.booleans(),
    ),
    st.builds(
        Train,
        tokens=st.integers(1, 10**9),
        mode=st.sampled_from(["dense", "soft", "straight", "hard"]),
        losses=st.dictionaries(st.sampled_from(["lm", "distill"]), st.floats(0, 10) | STAGES),
        target_sparsity=st.none() | st.floats(0.01, 0.99),
        lr=st.floats(0, 1),
        ramp=st.floats(0, 1),
    ),
)
RECIPES = st.builds(
    Recipe,
    name=st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1),
    steps=st.lists(STEPS, min_size=1, max_size=4).map(tuple),
    model=st.none() | st.just("some/model"),
    data=st.sampled_from(["docs", "self", "text.txt"]),
    block_length=st.integers(1, 4096),
    seed=st.integers(0, 2**31),
)


@settings(deadline=None)
@given(RECIPES)
def test_every_recipe_survives_its_yaml(recipe: Recipe) -> None:
    assert again(recipe) == recipe


def test_yaml_spells_out_every_default() -> None:
    (step,) = yaml.safe_load(Recipe("x", (Train(tokens=8),)).to_yaml())["steps"]
    assert step == {"train": asdict(Train(tokens=8))}


def test_a_step_without_options_has_its_defaults() -> None:
    recipe = parse_recipe({"name": "x", "steps": [{"split": None}, {"attach": {}}]})
    assert recipe.steps == (Split(), Attach())


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_a_number_may_be_written_as_yaml_reads_it_wrong(text: str) -> None:
    """YAML 1.1 takes 1e-4 for a string."""
    recipe = parse_recipe(yaml.safe_load(f"name: x\nsteps: [train: {{tokens: 8, lr: {text}}}]"))
    assert recipe.steps == (Train(tokens=8, lr=1e-4),)


def test_a_weight_may_have_stages() -> None:
    stages = [{"until": 0.3, "weight": 0}, {"until": 1, "weight": "1e-4", "curve": "constant"}]
    (step,) = parse_recipe(block(losses={"lm": 1, "l1": stages})).steps
    expected = (Stage(0.3, 0.0), Stage(1.0, 1e-4, "constant"))
    assert step == Train(tokens=8, losses={"lm": 1.0, "l1": expected})
    assert again(Recipe("x", (step,))).steps == (step,)


FULL = {"until": 1.0, "weight": 1.0}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"until of losses.l1 is \[\], but must be rising numbers above 0, at least one"),
        ([FULL, FULL], r"until of losses.l1 is \[1.0, 1.0\], but must be rising"),
        ([{"until": 0.0, "weight": 1.0}, FULL], r"is \[0.0, 1.0\], but must be rising"),
        ([{"until": float("nan"), "weight": 1.0}, FULL], r"is \[nan, 1.0\], but must be rising"),
        ([FULL, {"until": float("inf"), "weight": 1.0}], r"is \[1.0, inf\], but must be rising"),
        ([{"until": -1, "weight": 1.0}], r"is \[-1.0\], but must be rising"),
        ([{"until": 1, "weight": -1}], r"losses.l1\[0\].weight is -1.0, but must be 0 or more"),
        ([{"until": 1, "weight": float("nan")}], r"losses.l1\[0\].weight is nan, but must be 0"),
        ([{"until": 1, "weight": float("inf")}], r"losses.l1\[0\].weight is inf, but must be 0"),
        ([{"until": 1}], r"losses.l1\[0\]: `weight` is required"),
        ([{**FULL, "curv": 1}], r"losses.l1\[0\]: unknown key 'curv'; did you mean 'curve'"),
        ([{**FULL, "curve": "sin"}], r"curve: unknown value 'sin'; did you mean 'sine'"),
        ([0.5], r"losses.l1\[0\]: expected keys and values, not 0.5"),
        (None, r"losses.l1: expected float, not None"),
    ],
)
def test_stages_that_are_none_are_named(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(block(losses={"l1": stages}))


@pytest.mark.parametrize(
    ("drive", "loss"), [("eta", "efficiency"), ("l1", "l1"), ("hoyer", "hoyer")]
)
def test_a_drive_needs_a_target_and_a_weight_of_its_own(drive: str, loss: str) -> None:
    with pytest.raises(ValueError, match=f"drive {drive} needs a target_sparsity"):
        parse_recipe(block(drive=drive))
    with pytest.raises(ValueError, match=f"drive {drive} sets the weight of {loss}: give it no"):
        parse_recipe(block(drive=drive, target_sparsity=0.5, losses={loss: [FULL]}))
    assert parse_recipe(block(drive=drive, target_sparsity=0.5, losses={"lm": [FULL]}))


def test_an_integer_may_stand_for_a_float() -> None:
    (step,) = parse_recipe(block(losses={"lm": 1}, ramp=1)).steps
    assert step == Train(tokens=8, losses={"lm": 1.0}, ramp=1.0)
    assert again(Recipe("x", (step,))).steps == (step,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**block(), "sed": 1}, r"recipe: unknown key 'sed'; did you mean 'seed'\?"),
        (block(token=8), r"step 0 \(train\): unknown key 'token'; did you mean 'tokens'\?"),
        (block(mode="sotf"), r"mode: unknown value 'sotf'; did you mean 'soft'\?"),
        (block(parts="router"), "parts: unknown value 'router'; did you mean 'routers'"),
        ({"name": "x", "steps": [{"atach": {}}]}, "unknown step 'atach'; did you mean 'attach'"),
        (
            {"name": "x", "steps": [{"split": {}}, {"train": {}}]},
            r"step 1 \(train\): `tokens` or `epochs` is required",
        ),
        ({"steps": [{"split": {}}]}, "`name` is required"),
        ({"name": "x", "steps": []}, "recipe x: no steps"),
        ({"name": "x"}, "`steps` must be a list"),
        ({"name": "x", "steps": {"split": {}}}, "`steps` must be a list"),
        ({"name": "x", "steps": ["split"]}, "step 0: expected one `verb: {...}`"),
        ({"name": "x", "steps": [{"split": {}, "attach": {}}]}, "expected one `verb"),
        ({"name": "x", "steps": [{"split": 8}]}, r"step 0 \(split\): expected keys and values"),
        (["split"], "expected keys and values, not list"),
        (None, "expected keys and values, not NoneType"),
        ({"name": 3, "steps": [{"split": {}}]}, "name: expected str, not 3"),
        ({**block(), "seed": "one"}, "seed: expected int, not 'one'"),
        ({**block(), "seed": True}, "seed: expected int, not True"),
        ({**block(), "block_length": 8.5}, "block_length: expected int, not 8.5"),
        (block(tokens="8k"), "tokens: expected int, not '8k'"),
        (block(tokens=True), "tokens: expected int, not True"),
        (block(lr="fast"), "lr: expected float, not 'fast'"),
        (block(lr=None), "lr: expected float, not None"),
        (block(lr=False), "lr: expected float, not False"),
        (block(losses="lm"), "losses: expected dict, not 'lm'"),
        (block(losses={"lm": "much"}), "losses.lm: expected float, not 'much'"),
        (block(losses={1: 1.0}), "losses: key: expected str, not 1"),
        (block(target_sparsity=[0.5]), r"target_sparsity: expected float, not \[0.5\]"),
        ({"name": "x", "steps": [{"attach": {"selector": 2}}]}, "selector: expected dict, not 2"),
    ],
)
def test_what_is_refused_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(given)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("tokens", -8, "0 or more"),
        ("batch_size", 0, "at least 1"),
        ("accumulate", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("lr", -1e-4, "0 or more"),
        ("lr", float("nan"), "0 or more"),
        ("router_lr", -1.0, "0 or more"),
        ("warmup", 1.5, r"a share in \[0, 1\), or a whole number of optimizer steps"),
        ("floor", 1.5, r"in \[0, 1\]"),
        ("ramp", -0.1, r"in \[0, 1\]"),
        ("target_sparsity", 0.0, "strictly between 0 and 1"),
        ("target_sparsity", 1.0, "strictly between 0 and 1"),
        ("target_sparsity", 50.0, "strictly between 0 and 1"),
        ("target_sparsity", float("nan"), "strictly between 0 and 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_rule(key: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"train: {key} is {value}, but must be {rule}"):
        parse_recipe(block(**{key: value}))


@pytest.mark.parametrize(
    "step",
    [
        {"split": {"expert_size": 0}},
        {"attach": {"start_sparsity": 1.0}},
        {"swap": {"activation": {"kind": "fatrelu"}, "max_error": 0}},
    ],
)
def test_ranges_hold_in_every_step(step: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="but must be"):
        parse_recipe({"name": "x", "steps": [step]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`activation` is required"),
        ({"activation": "relu"}, "activation: expected dict, not 'relu'"),
        ({"activation": {"kind": "relu"}, "theta": 1}, "unknown key 'theta'"),
    ],
)
def test_a_swap_names_its_activation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^recipe: step 0 \(swap\): {message}"):
        parse_recipe({"name": "x", "steps": [{"swap": options}]})


def test_blocks_have_a_length() -> None:
    with pytest.raises(ValueError, match="block_length is 0, but must be at least 1"):
        parse_recipe({**block(), "block_length": 0})


def test_a_file_that_is_not_there_and_one_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.yaml does not exist"):
        read_recipe(tmp_path / "no.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [x\nsteps: {")
    with pytest.raises(ValueError, match="is no YAML"):
        read_recipe(bad)
    bad.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="is no YAML"):
        read_recipe(bad)


def test_a_file_cannot_name_python_objects(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: !!python/object/apply:os.getcwd []\nsteps: [split: {}]")
    with pytest.raises(ValueError, match="is no YAML"):
        read_recipe(bad)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: x\nsteps: [split: {expert_sise: 8}]")
    with pytest.raises(ValueError, match=r"mine\.yaml: step 0 \(split\): unknown key"):
        read_recipe(file)


# --- options of the command line


def test_no_option_changes_nothing() -> None:
    assert with_options(TWO_STAGES) == TWO_STAGES


def test_tokens_keep_their_shares() -> None:
    scaled = with_options(TWO_STAGES, tokens=40_000)
    assert [step.tokens for step in scaled.steps if isinstance(step, Train)] == [30_000, 10_000]
    assert scaled.train_tokens() == 40_000
    assert scaled.steps[:2] == TWO_STAGES.steps[:2]  # calibration is no training


THREE = Recipe(
    "three", (Train(epochs=3), Train(epochs=1), Train(epochs=1)), epoch_tokens=1_000, bos="never"
)


def test_epochs_and_tokens_take_each_others_place() -> None:
    assert [step.epochs for step in with_options(THREE, epochs=10).train_steps] == [6, 2, 2]
    for changed in (with_options(THREE, tokens=50), with_options(THREE.counted(), tokens=50)):
        assert [(step.tokens, step.epochs) for step in changed.train_steps] == [
            (30, 0),
            (10, 0),
            (10, 0),
        ]
    once = with_options(TWO_STAGES, epochs=2)
    assert [(step.tokens, step.epochs) for step in once.train_steps] == [(0, 1.5), (0, 0.5)]
    assert THREE.counted().train_tokens() == 5_000 and THREE.train_tokens() == 0
    assert with_options(THREE, packing="isolated", bos="always").bos == "always"


def test_epochs_are_written_and_read_again() -> None:
    assert parse_recipe(yaml.safe_load(THREE.to_yaml())) == THREE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("x", (Train(tokens=8, epochs=1),)), "8 tokens and 1 epochs, and the two"),
        (lambda: Recipe("x", (Train(tokens=8), Train(epochs=1))), "some train steps count tokens"),
        (lambda: Recipe("x", (Train(epochs=-1),)), "epochs is -1, but must be 0 or more"),
        (
            lambda: Recipe("x", (Train(epochs=float("inf")),)),
            "epochs is inf, but must be at most",
        ),
        (lambda: replace(THREE, epoch_tokens=0).counted(), "trains 5 epochs of a text that is not"),
        (lambda: replace(THREE, epoch_tokens=-1), "epoch_tokens is -1, but must be 0 or more"),
        (lambda: with_options(THREE, epochs=0), "epochs is 0, but must be a number above 0"),
        (lambda: with_options(THREE, epochs=1, tokens=5), "5 tokens and 1 epochs are given"),
    ],
)
def test_how_often_a_text_is_read_is_said_once(make: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4), st.integers(10**4, 10**6))
def test_shares_are_kept_to_a_token(parts: list[int], tokens: int) -> None:
    recipe = Recipe("x", tuple(Train(tokens=part) for part in parts))
    scaled = with_options(recipe, tokens=tokens)
    for part, step in zip(parts, scaled.steps, strict=True):
        assert step.tokens == pytest.approx(tokens * part / sum(parts), abs=1)


def test_every_option_lands_where_it_belongs() -> None:
    changed = with_options(
        TWO_STAGES, target_sparsity=0.7, expert_size=16, data="text.txt", block_length=64, seed=3
    )
    split, attach, soft, hard = changed.steps
    assert split == Split(expert_size=16)
    assert attach == Attach()
    assert soft == replace(TWO_STAGES.steps[2], target_sparsity=0.7)
    assert hard == TWO_STAGES.steps[3]  # it had no target, so it gets none
    assert (changed.data, changed.block_length, changed.seed) == ("text.txt", 64, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 1.5}, "target_sparsity is 1.5, but must be strictly between 0 and 1"),
        ({"expert_size": 0}, "expert_size is 0, but must be at least 1"),
        ({"tokens": 0}, "tokens is 0, but must be at least 1"),
        ({"tokens": -5}, "tokens is -5, but must be at least 1"),
        ({"block_length": 0}, "block_length is 0, but must be at least 1"),
    ],
)
def test_an_option_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_options(TWO_STAGES, **options)


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({"target_sparsity": 0.5}, "no step with a target_sparsity"),
        ({"tokens": 100}, "no train step"),
        ({"expert_size": 8}, "no split step"),
    ],
)
def test_an_option_that_no_step_can_take(options: dict[str, Any], lacks: str) -> None:
    recipe = Recipe("only-attach", (Attach(),))
    with pytest.raises(ValueError, match=f"recipe only-attach has {lacks}"):
        with_options(recipe, **options)


# --- the dense control


def test_the_control_takes_the_same_train_steps_without_a_router() -> None:
    control = control_recipe(TWO_STAGES)
    assert control.steps == (Train(tokens=300, lr=1e-4), Train(tokens=100, lr=3e-4))
    assert (control.data, control.seed, control.block_length) == ("docs", 0, 512)
    assert control.name == "two-stages-control"
    assert again(control) == control


def test_the_control_keeps_what_sets_the_pace() -> None:
    pace = {"lr": 2e-4, "batch_size": 2, "accumulate": 3, "warmup": 0.1, "checkpoint_every": 7}
    step = Train(tokens=9, mode="straight", target_sparsity=0.3, ramp=0.1, router_lr=1.0, **pace)
    (dense,) = control_recipe(Recipe("x", (Split(), Attach(), step))).steps
    assert dense == Train(tokens=9, **pace)


ROUTING: dict[str, Any] = {
    "mode": "straight",
    "losses": {"lm": 1.0, "efficiency": 0.1, "distill": 1.0},
    "target_sparsity": 0.3,
    "drive": "eta",
    "ramp": 0.1,
    "router_lr": 1.0,
}
"""The fields of a train step that mean nothing without routers, each away from its default."""


def test_the_control_keeps_all_that_is_not_about_routing() -> None:
    """A new field of `Train` is kept, or named in `ROUTING` here."""
    kept = {field.name for field in fields(Train)} - set(ROUTING)
    others: dict[str, Any] = {
        "tokens": 9,
        "parts": "ffn",
        "lora": Lora(rank=3, alpha=5),
        "checkpointing": True,
        "lr": 2e-4,
        "batch_size": 2,
        "accumulate": 3,
        "warmup": 0.1,
        "checkpoint_every": 7,
    }
    default = Train(tokens=1)
    others |= {name: getattr(default, name) for name in kept - set(others)}
    step = Train(**others, **ROUTING)
    (dense,) = control_recipe(Recipe("x", (Split(), Attach(), step))).steps
    for name in kept:
        assert getattr(dense, name) == getattr(step, name), name
    for name in ROUTING:
        assert getattr(step, name) != getattr(default, name), name
        assert getattr(dense, name) == getattr(default, name), name


def test_a_step_that_trains_routers_alone_falls_away_in_the_control() -> None:
    routers = Train(tokens=9, mode="soft", parts="routers")
    after = Train(tokens=5, mode="hard", parts="ffn")
    recipe = Recipe("x", (Split(), Attach(), routers, after))
    assert control_recipe(recipe).steps == (Train(tokens=5, parts="ffn"),)
    with pytest.raises(ValueError, match=r"x trains nothing but routers: its dense control is the"):
        control_recipe(replace(recipe, steps=(Split(), Attach(), routers)))


def _ramp(weight: float) -> tuple[Stage, ...]:
    return Stage(1, 0.0), Stage(2, weight)


def test_the_donor_is_the_control_of_what_it_says() -> None:
    """A dense model that learns its own logits stays what it is."""
    learned = Train(tokens=9)
    taught = Train(tokens=5, mode="soft", losses={"distill": 1.0, "efficiency": 0.1})
    alone = Recipe("x", (Split(), Attach(), taught))
    assert control_recipe(replace(alone, steps=(learned, *alone.steps))).steps == (learned,)
    assert not has_control(alone)
    with pytest.raises(ValueError, match=r"x trains the donor without a language loss .*: its"):
        control_recipe(alone)
    for lm, learns in ((0.0, False), (_ramp(0.0), False), (0.5, True), (_ramp(0.5), True)):
        step = replace(taught, losses={"lm": lm, "distill": 1.0})
        assert has_control(replace(alone, steps=(step,))) is learns


def test_a_recipe_that_trains_nothing_has_no_control() -> None:
    with pytest.raises(ValueError, match="two-steps trains nothing: its dense control is the"):
        control_recipe(Recipe("two-steps", (Split(), Attach())))


def test_step_names_are_those_of_yaml() -> None:
    assert [step.verb for step in TWO_STAGES.steps] == ["split", "attach", "train", "train"]


def test_recipes_are_listed_without_torch() -> None:
    code = "import sys; from moe_tools.recipe import known_recipes; assert known_recipes()\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\nsteps: [{split: {expert_size: 8}}]", "the key 'name' stands twice"),
        ("name: a\nsteps: [{split: {expert_size: 8, expert_size: 9}}]", "'expert_size' stands twi"),
        ("[" * 5000, "too many lists or mappings inside each other"),
        (f"name: a\nseed: {'9' * 5000}\nsteps: []", "is no YAML: Exceeds the limit"),
        ("name: 2020-99-99\nsteps: []", "is no YAML: month must be in 1..12"),
        ("name: !!python/name:os.system\nsteps: []", "is no YAML: could not determine a constru"),
    ],
)
def test_a_text_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file)
    assert str(file) in str(caught.value)


def test_what_a_value_is_instead_is_said_in_short(tmp_path: Path) -> None:
    """Aliases make gigabytes of a few words, as soon as someone prints them."""
    names = "abcdefghij"
    lines = ["  a: &a [x, x]"]
    lines += [f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(names)]
    text = "name: n\nsteps: [{split: {expert_size: 8}}]\ndata:\n" + "\n".join(lines)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="data: expected str, not ") as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 500


def test_a_train_step_without_tokens_waits_for_them() -> None:
    recipe = read_recipe(recipe_path("prox"))
    assert recipe.train_tokens() == 0 and not has_control(recipe)
    assert with_options(recipe, tokens=4096).steps[-1].tokens == 4096
    waiting = Recipe("x", (Train(tokens=0),))
    assert not has_control(waiting) and has_control(with_options(waiting, tokens=4096))
