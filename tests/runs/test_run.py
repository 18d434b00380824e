"""Whole runs of a tiny llama on a tiny text: what is written, what is refused, what resumes."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import moe_tools
from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.data import Batches, blocks, fingerprint
from moe_tools.experts.conversion import read_conversion
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.experts.selectors import TopK
from moe_tools.hosts.ffn import find_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.recipe import (
    Attach,
    Budget,
    Fit,
    Recipe,
    Refit,
    Split,
    Step,
    Swap,
    Train,
    read_recipe,
    with_options,
)
from moe_tools.runs import folder as run_folder
from moe_tools.runs import run as pipeline
from moe_tools.runs import text as run_text
from moe_tools.runs.run import run
from moe_tools.steps import attach as attach_step
from moe_tools.steps import split as split_step
from moe_tools.training import train as train_step
from tests.families import (
    EXPERT_SIZE,
    aligned,
    build,
    force_on,
    is_router,
    load_stock,
    logits,
)
from tests.killed import Killed

ROOT = Path(__file__).parents[2]
WORDS = [f"w{index}" for index in range(60)]
LENGTH = 16
FP32 = {"dtype": torch.float32}
SOFT = Train(
    tokens=12 * 4 * LENGTH,
    mode="soft",
    target_sparsity=0.4,
    losses={"lm": 1.0, "distill": 0.5, "separability": 0.1},
    lr=1e-3,
    checkpoint_every=2,
)
HARD = replace(SOFT, mode="hard", tokens=6 * 4 * LENGTH, losses={"lm": 1.0, "distill": 0.5})
LTE = Recipe(
    "lte-tiny",
    (Split(EXPERT_SIZE, tokens=256), Attach(start_sparsity=0.1, tokens=512), SOFT, HARD),
    block_length=LENGTH,
)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/ and text.txt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    names = ["[UNK]", "[EOS]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", mask_token="[MASK]"
    )
    save(build("llama", bos_token_id=1, eos_token_id=1), folder / "donor", fast)
    draw = random.Random(0)
    passages = [" ".join(draw.choices(WORDS, k=30)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(passages))
    return folder


@pytest.fixture(scope="session")
def recipe(work: Path) -> Recipe:
    return replace(LTE, data=str(work / "text.txt"))


@pytest.fixture(scope="session")
def done(work: Path, recipe: Recipe) -> Path:
    """An undisturbed run with its control and every step kept."""
    return run(recipe, str(work / "donor"), work / "done", control=True, keep_steps=True, **FP32)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and its content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


FIGURES = {"lm", "distill", "separability", "sparsity", "reference"}


def history(folder: Path) -> list[list[dict[str, float]]]:
    """What every train step logged, without clocks and without means that a resume restarts."""
    steps = [step for step in metrics(folder)["steps"] if "history" in step]
    return [
        [{k: v for k, v in entry.items() if k in FIGURES | {"step"}} for entry in step["history"]]
        for step in steps
    ]


# --- what is written


def test_the_output_is_a_plain_folder(done: Path, work: Path) -> None:
    names = {path.name for path in done.iterdir()}
    plain = {"config.json", "generation_config.json", "model.safetensors"}
    plain |= {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names == plain | {"recipe.yaml", "metrics.json", "control", "steps"}
    host = {key for key in tensors(done) if not is_router(key)}
    assert host == set(tensors(work / "donor"))


def test_the_stock_class_loads_the_same_folder(done: Path) -> None:
    ours = moe_tools.load(done)
    assert len(expert_ffns(ours)) == 2
    conversion = read_conversion(ours)
    assert conversion is not None and conversion.mode == "hard"
    theirs = aligned(load_stock(LlamaForCausalLM, done).eval())
    ours = aligned(ours)
    assert not torch.equal(logits(ours), logits(theirs))
    force_on(ours)
    assert torch.equal(logits(ours), logits(theirs))


def test_the_donor_is_found_from_any_folder(
    work: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    out = run(replace(recipe, steps=recipe.steps[:1]), "donor", tmp_path / "out", **FP32)
    conversion = read_conversion(load(out))
    assert conversion is not None and conversion.donor == str(work / "donor")


def test_the_recipe_is_written_as_it_was_run(done: Path, recipe: Recipe) -> None:
    assert read_recipe(done / "recipe.yaml") == recipe


def test_the_metrics_say_what_each_step_did(done: Path, recipe: Recipe, work: Path) -> None:
    seen = metrics(done)
    assert (seen["recipe"], seen["donor"]) == ("lte-tiny", str(work / "donor"))
    assert seen["train_tokens"] == recipe.train_tokens() == 18 * 4 * LENGTH
    split, attach, soft, hard = seen["steps"]
    assert split["expert_size"] == EXPERT_SIZE and attach["router"] == "sigmoid"
    assert (soft["steps"], hard["steps"]) == (12, 6)
    assert soft["trained_tokens"] == 12 * 4 * LENGTH
    for step in (soft, hard):
        assert set(step) >= FIGURES - {"separability"} and step["history"]
        assert step["history"][-1]["step"] == step["steps"]
    assert hard["reference"] == pytest.approx(0.4)


def test_every_kept_step_is_a_model_folder(done: Path) -> None:
    steps = sorted(path.name for path in (done / "steps").iterdir())
    assert steps == ["0-split", "1-attach", "2-train", "3-train"]
    routed = [bool(expert_ffns(load(done / "steps" / name))) for name in steps]
    assert routed == [False, True, True, True]
    assert same_weights(done / "steps" / "3-train", done)
    split = aligned(load(done / "steps" / "0-split"))
    donor = aligned(load(metrics(done)["donor"]))
    assert (logits(split) - logits(donor)).abs().max() <= 2e-6


def test_the_steps_are_dropped(work: Path, recipe: Recipe, tmp_path: Path, done: Path) -> None:
    out = run(recipe, str(work / "donor"), tmp_path / "out", **FP32)
    assert not (out / "steps").exists()
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert same_weights(out, done)  # and nothing depends on the folder


def test_bf16_weights_beside_fp32_routers(work: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = run(recipe, str(work / "donor"), tmp_path / "out")
    for name, tensor in tensors(out).items():
        assert tensor.dtype == (torch.float32 if is_router(name) else torch.bfloat16), name


FATRELU = Swap({"kind": "fatrelu"}, max_error=0.05, tokens=256)
PROSPARSE = (Swap({"kind": "relu"}), Train(tokens=4 * 4 * LENGTH), FATRELU)


def test_a_swap_a_training_and_another_swap(recipe: Recipe, work: Path, tmp_path: Path) -> None:
    steps = (*PROSPARSE, Split(EXPERT_SIZE, tokens=256), Attach(tokens=512))
    out = run(
        replace(recipe, steps=steps), str(work / "donor"), tmp_path / "out", keep_steps=True, **FP32
    )
    relu, trained, fatrelu, split, attached = sorted((out / "steps").iterdir())
    assert load_stock(LlamaForCausalLM, trained).config.hidden_act == "relu"
    assert not same_weights(relu, trained) and same_weights(trained, fatrelu)
    for folder in (fatrelu, split, attached, out):
        with pytest.raises(KeyError, match=r"moe_tools\.fatrelu: load this folder with moe_tools"):
            load_stock(LlamaForCausalLM, folder)
    thetas = {name: found["theta"] for name, found in metrics(out)["steps"][2]["thetas"].items()}
    assert {ffn.name: ffn.act.theta for ffn in find_ffns(load(split))} == thetas
    assert all(theta > 0 for theta in thetas.values())

    cut, dense = logits(aligned(load(fatrelu))), logits(aligned(load(trained)))
    assert (cut - dense).abs().max() > 0
    with every_expert_on(model := load(out)):
        assert (logits(aligned(model)) - cut).abs().max() <= 2e-6
    made = read_conversion(model)
    assert made is not None and made.router == "sigmoid" and made.stock_activation == "relu"
    assert {name: own["theta"] for name, own in made.activation_of.items()} == thetas


def test_a_swapped_folder_is_a_donor_like_any_other(
    recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    swap = replace(recipe, steps=(Swap({"kind": "drelu"}),))
    first = run(swap, str(work / "donor"), tmp_path / "first", **FP32)
    split = replace(recipe, steps=(Split(EXPERT_SIZE, tokens=256),))
    second = run(split, str(first), tmp_path / "second", **FP32)
    one, other = read_conversion(load(first)), read_conversion(load(second))
    assert one is not None and one.donor == str(work / "donor") and one.expert_size is None
    assert other == replace(one, donor=str(first), expert_size=EXPERT_SIZE)
    dense = logits(aligned(load(first)))
    assert (logits(aligned(load(second))) - dense).abs().max() <= 2e-6
    assert (dense - logits(aligned(load(work / "donor")))).abs().max() > 1e-3


def test_the_relu_recipe_gives_a_stock_model(work: Path, tmp_path: Path) -> None:
    out = moe_tools.convert(
        str(work / "donor"),
        tmp_path / "out",
        method="relu",
        data=str(work / "text.txt"),
        block_length=LENGTH,
        tokens=256,
        **FP32,
    )
    stock = load_stock(LlamaForCausalLM, out)
    assert torch.equal(logits(aligned(stock)), logits(aligned(load(out))))
    assert {type(layer.mlp.act_fn).__name__ for layer in stock.model.layers} == {"ReLU"}


@pytest.mark.parametrize("name", ["lte", "lte_paper"])
def test_a_shipped_recipe_runs(name: str, work: Path, tmp_path: Path) -> None:
    shipped = with_options(
        read_recipe(ROOT / "recipes" / f"{name}.yaml"),
        expert_size=EXPERT_SIZE,
        tokens=4096,
        data=str(work / "text.txt"),
        block_length=LENGTH,
        target_sparsity=0.3,
    )
    out = run(shipped, str(work / "donor"), tmp_path / "out", **FP32)
    assert metrics(out)["train_tokens"] == 4096
    assert metrics(out)["steps"][-1]["sparsity"] == pytest.approx(0.3, abs=0.1)


def untrained(name: str, work: Path) -> Recipe:
    """A shipped recipe whose routers are fitted or made, for the tiny donor and little text."""
    shipped = with_options(
        read_recipe(ROOT / "recipes" / f"{name}.yaml"),
        expert_size=EXPERT_SIZE,
        data=str(work / "text.txt"),
        block_length=LENGTH,
        target_sparsity=1 / 3,  # whole experts a token
    )
    steps = [replace(step, tokens=1024) for step in shipped.steps]
    return replace(
        shipped,
        steps=tuple(
            replace(s, epochs=2, batch_size=128) if isinstance(s, Fit) else s for s in steps
        ),
    )


@pytest.fixture(scope="session")
def moefied(work: Path) -> Path:
    """An undisturbed run of the moefication recipe."""
    return run(untrained("moefication", work), str(work / "donor"), work / "moefied", **FP32)


@pytest.mark.parametrize("name", ["moefication", "d2dmoe", "cmoe"])
def test_a_shipped_recipe_without_router_training_runs(
    name: str, work: Path, tmp_path: Path
) -> None:
    recipe = untrained(name, work)
    out = run(recipe, str(work / "donor"), tmp_path / "out", **FP32)
    steps = metrics(out)["steps"]
    assert len(steps) == len(recipe.steps)
    assert steps[-1]["sparsity"] == pytest.approx(1 / 3, abs=0.02)
    model = load(out)
    conversion, ffns = read_conversion(model), expert_ffns(model)
    assert conversion is not None
    assert list(conversion.selector_of) == list(steps[-1]["given"]) == [ffn.name for ffn in ffns]
    assert {ffn.shared for ffn in ffns} == {3 if name == "cmoe" else 0}
    assert {ffn.off_F is None for ffn in ffns} == {name != "moefication"}
    fits = [step["routers"] for step in steps if "routers" in step]
    assert [list(found) for found in fits] == [[ffn.name for ffn in ffns]] * (name != "cmoe")
    text = whole_text(recipe, work, tokens=1024)
    assert evaluate(model, text).ffn_sparsity == pytest.approx(steps[-1]["sparsity"], abs=1e-3)
    if name != "d2dmoe":  # nothing but routers was added to the donor
        donor = aligned(load(work / "donor"))
        with every_expert_on(model):
            assert (logits(aligned(model)) - logits(donor)).abs().max() <= 2e-6
    else:
        assert steps[0]["hoyer"] > 1


# --- which tokens


def test_the_stock_recipe_makes_one_moe_of_all_layers(work: Path, tmp_path: Path) -> None:
    """16 experts of 96 neurons, two of them shared, and one k: what other programs can hold."""
    model = build("llama", bos_token_id=1, eos_token_id=1, intermediate_size=1536)
    save(model, tmp_path / "donor", load_tokenizer(work / "donor"))
    shipped = read_recipe(ROOT / "recipes" / "stock_moe.yaml")
    words = {"data": str(work / "text.txt"), "block_length": LENGTH, "target_sparsity": 0.25}
    recipe = with_options(shipped, **words)
    recipe = replace(recipe, steps=tuple(replace(step, tokens=512) for step in recipe.steps))
    found = load(run(recipe, str(tmp_path / "donor"), tmp_path / "out", **FP32))
    for ffn in expert_ffns(found):
        assert ffn.division.sizes == (96,) * 16 and ffn.shared == 2 and ffn.mode == "hard"
        assert isinstance(ffn.selector, TopK) and ffn.selector.count(14) == 10
    assert metrics(tmp_path / "out")["steps"][-1]["sparsity"] == pytest.approx(0.25)


def test_the_llama_moe_recipe_trains_and_stays_weighted(work: Path, tmp_path: Path) -> None:
    recipe = untrained("llama_moe", work)
    out = run(recipe, str(work / "donor"), tmp_path / "out", **FP32)
    ffns = expert_ffns(load(out))
    assert {(ffn.mode, ffn.shared, ffn.selector.count(6)) for ffn in ffns} == {("weighted", 0, 4)}
    assert metrics(out)["steps"][-1]["load_balance"] >= 0.9


def whole_text(recipe: Recipe, work: Path, tokens: int | None = None) -> Tensor:
    return blocks(
        recipe.data,
        load_tokenizer(work / "donor"),
        split="train",
        length=recipe.block_length,
        tokens=tokens or recipe.train_tokens(),
        seed=recipe.seed,
    )


def test_train_steps_share_the_text_and_the_control_sees_all_of_it(
    done: Path, recipe: Recipe, work: Path
) -> None:
    text = whole_text(recipe, work)
    assert len(text) == 18 * 4
    *_, soft, hard = metrics(done)["steps"]
    assert soft["data"] == fingerprint(text[:48])
    assert hard["data"] == fingerprint(text[48:])
    control = metrics(done / "control")["steps"]
    assert [step["data"] for step in control] == [soft["data"], hard["data"]]
    assert metrics(done / "control")["train_tokens"] == metrics(done)["train_tokens"]


def test_the_control_is_a_dense_model_of_its_own(done: Path, work: Path) -> None:
    control = tensors(done / "control")
    donor = tensors(work / "donor")
    assert control.keys() == donor.keys()
    assert all(not torch.equal(control[key], donor[key]) for key in donor)
    assert read_conversion(load(done / "control")) is None


def trained_text(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, work: Path, out: Path
) -> list[Tensor]:
    """The blocks that each train step got; nothing is trained."""
    got: list[Tensor] = []

    def fake(model: Any, step: Train, text: Batches, *args: Any, **kwargs: Any) -> Any:
        got.append(torch.cat([batch.ids_BT for batch in text]))
        return {"steps": 1}

    monkeypatch.setattr(train_step, "train", fake)
    run(recipe, str(work / "donor"), out, control=True, **FP32)
    return got


def sparse(*tokens: int) -> tuple[Step, ...]:
    """Train steps none of which the control can share."""
    losses = {"lm": 1.0, "l1": 0.1}
    trains = (Train(tokens=count, losses=losses) for count in tokens)
    return tuple(trains)


@pytest.mark.parametrize("tokens", [(104, 104), (24, 40, 24), (500, 15, 500), (17,), (33, 1)])
def test_the_control_sees_what_the_steps_see(
    tokens: tuple[int, ...],
    recipe: Recipe,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a step's tokens do not fill its last block."""
    steps = replace(recipe, steps=sparse(*tokens))
    got = trained_text(monkeypatch, steps, work, tmp_path / "out")
    parts, control = got[: len(tokens)], got[len(tokens) :]
    assert all(len(part) for part in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, control, strict=True))
    if all(count >= LENGTH for count in tokens):
        text = whole_text(steps, work)[: sum(tokens) // LENGTH]
        assert torch.equal(torch.cat(parts), text)


def test_a_text_too_short_is_shared_by_the_steps(
    recipe: Recipe, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first train step must not leave the second without a token."""
    have = len(whole_text(recipe, work, tokens=10**9))
    steps = replace(recipe, steps=sparse(300_000, 100_000))
    first, second, *control = trained_text(monkeypatch, steps, work, tmp_path / "out")
    assert len(first) + len(second) == have
    assert torch.equal(torch.cat([first, second]), torch.cat(control))
    assert len(first) == pytest.approx(0.75 * have, abs=1)


def test_the_control_begins_with_the_dense_steps_that_the_run_did(
    recipe: Recipe, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, attach, soft, _ = recipe.steps
    dense = Train(tokens=8 * LENGTH, lr=1e-3)
    late = replace(recipe, steps=(dense, split, attach, replace(soft, tokens=8 * LENGTH)))
    got = trained_text(monkeypatch, late, work, tmp_path / "out")
    first, second, control = got  # not four
    assert torch.equal(control, second) and not torch.equal(first, second)


def test_the_teacher_is_the_model_before_it_was_routed(
    recipe: Recipe, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The donor where nothing was trained before; else what dense training made of it."""
    split, attach, soft, _ = recipe.steps
    distilled = replace(soft, tokens=8 * LENGTH, losses={"lm": 1.0, "distill": 1.0})
    dense = Train(tokens=8 * LENGTH, lr=1e-2)
    teachers: dict[str, Any] = {}
    real = train_step.train

    def spy(model: Any, step: Train, *args: Any, **kwargs: Any) -> Any:
        told = kwargs["donor"]
        teachers[step.mode] = None if told is None else told.load("cpu")
        return real(model, step, *args, **kwargs)

    monkeypatch.setattr(train_step, "train", spy)

    def taught(name: str, *steps: Step) -> Tensor:
        run(replace(recipe, steps=steps), str(work / "donor"), tmp_path / name, **FP32)
        return logits(teachers["soft"])

    donor = logits(load(work / "donor"))
    assert (taught("early", split, attach, distilled) - donor).abs().max() <= 2e-6
    late = taught("late", dense, split, attach, distilled)
    run(replace(recipe, steps=(dense,)), str(work / "donor"), tmp_path / "dense", **FP32)
    assert (late - logits(load(tmp_path / "dense"))).abs().max() <= 2e-6
    assert (late - donor).abs().max() > 1e-3
    assert teachers["dense"] is None


def test_calibration_asks_for_its_own_tokens(
    recipe: Recipe, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than is trained on; training still sees what it asked for."""
    steps = (Split(EXPERT_SIZE, tokens=900), Attach(tokens=1600), Train(tokens=64, mode="hard"))
    seen: dict[str, Tensor] = {}
    for name, module in (("split", split_step), ("attach", attach_step)):
        real = getattr(module, name)

        def spy(*args: Any, name: str = name, real: Any = real) -> Any:
            seen[name] = next(arg for arg in args if isinstance(arg, Tensor))
            return real(*args)

        monkeypatch.setattr(module, name, spy)
    got, _ = trained_text(monkeypatch, replace(recipe, steps=steps), work, tmp_path / "out")
    text = whole_text(recipe, work, tokens=1600)
    assert torch.equal(got, text[:4])
    assert torch.equal(seen["split"], text[: 900 // LENGTH])
    assert torch.equal(seen["attach"], text)


def test_the_donor_s_own_samples_are_text_too(work: Path, recipe: Recipe, tmp_path: Path) -> None:
    short = replace(
        recipe, data="self", steps=(Split(EXPERT_SIZE, tokens=64), Train(tokens=256, batch_size=2))
    )
    out = run(short, str(work / "donor"), tmp_path / "out", control=True, **FP32)
    (step,) = (step for step in metrics(out)["steps"] if "data" in step)
    (control,) = metrics(out / "control")["steps"]
    assert step["steps"] == 8
    assert control["data"] == step["data"]
    assert not (out / "steps").exists()


def test_samples_are_drawn_once(
    work: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run goes on with the samples it has."""
    short = replace(recipe, data="self", steps=(Split(EXPERT_SIZE, tokens=64), Train(tokens=64)))
    die_in(monkeypatch, "train")
    with pytest.raises(Killed):
        run(short, str(work / "donor"), tmp_path / "out", **FP32)
    monkeypatch.undo()
    die_in(monkeypatch, "generate_blocks")
    run(short, str(work / "donor"), tmp_path / "out", **FP32)


# --- the same call again, and others


def test_a_complete_run_is_left_alone(done: Path, recipe: Recipe, work: Path) -> None:
    before = snapshot(done)
    for _ in range(2):
        assert run(recipe, str(work / "donor"), done, control=True, keep_steps=True, **FP32) == done
    assert snapshot(done) == before


def test_a_control_can_be_added_later(
    work: Path, recipe: Recipe, tmp_path: Path, done: Path
) -> None:
    out = run(recipe, str(work / "donor"), tmp_path / "out", **FP32)
    before = snapshot(out)
    run(recipe, str(work / "donor"), out, control=True, **FP32)
    after = snapshot(out)
    assert {name: after[name] for name in before} == before
    assert same_weights(out / "control", done / "control")


@pytest.mark.parametrize("other", ["recipe", "seed", "donor"])
def test_another_run_is_not_mixed_in(
    other: str, done: Path, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    donor = work / "donor"
    if other == "donor":
        donor = shutil.copytree(donor, tmp_path / "other-donor")
    changed = {
        "recipe": with_options(recipe, target_sparsity=0.7),
        "seed": replace(recipe, seed=1),
        "donor": recipe,
    }[other]
    before = snapshot(out)
    with pytest.raises(ValueError, match=r"holds another run \(see .*recipe\.yaml\): choose"):
        run(changed, str(donor), out, **FP32)
    assert snapshot(out) == before


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("began", ["# text: 0000000000000000\n", ""])
def test_a_run_on_a_text_that_moved_is_not_resumed(
    complete: bool, began: str, done: Path, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    first, rest = (out / "recipe.yaml").read_text().split("\n", 1)
    assert first == f"# text: {metrics(done)['text']}"
    (out / "recipe.yaml").write_text(began + rest)
    if not complete:
        (out / "metrics.json").unlink()
    before = snapshot(out)
    was = "0000000000000000" if began else r"\(unknown\)"
    with pytest.raises(ValueError, match=rf"was begun on the text {was}, and the same source is"):
        run(recipe, str(work / "donor"), out, **FP32)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "sub/deep.txt"])
def test_a_folder_that_holds_something_else_is_left_alone(
    name: str, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    before = snapshot(out)
    with pytest.raises(ValueError, match="exists and is not empty: choose another --output"):
        run(recipe, str(work / "donor"), out, **FP32)
    assert snapshot(out) == before


def test_a_file_is_no_output(recipe: Recipe, work: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="choose another --output"):
        run(recipe, str(work / "donor"), tmp_path / "out", **FP32)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_taken(recipe: Recipe, work: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    short = replace(recipe, steps=recipe.steps[:1])
    run(short, str(work / "donor"), tmp_path / "out", **FP32)
    assert (tmp_path / "out" / "metrics.json").is_file()


# --- mistakes are found before anything is written


def with_steps(*steps: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, steps=steps)


MISTAKES: dict[str, tuple[Callable[[Recipe], Recipe], str]] = {
    "expert size": (
        lambda recipe: with_options(recipe, expert_size=49),
        r"layers\.0\.mlp has 48 neurons: experts of 49 are not possible",
    ),
    "loss": (
        with_steps(Split(), Attach(), replace(SOFT, losses={"lmm": 1.0})),
        "unknown loss 'lmm'",
    ),
    "router": (with_steps(Split(), Attach(router="sigmod")), "did you mean 'sigmoid'"),
    "selector": (
        with_steps(Split(), Attach(selector={"kind": "topk"})),
        "top-k needs either k or share",
    ),
    "shared experts": (
        with_steps(Split(EXPERT_SIZE, shared_experts=6), Attach()),
        r"layers\.0\.mlp: 6 of 6 experts cannot be shared",
    ),
    "router option": (with_steps(Split(), Attach(router_options={"hidden": 3})), "'hidden'"),
    "negative scores": (
        with_steps(Split(), Attach("similarity", selector={"kind": "top_p", "p": 0.5})),
        "router similarity scores below 0, which selector top_p cannot compare",
    ),
    "fit before attach": (with_steps(Split(), Fit()), "fit needs routers: put `attach` before it"),
    "budget before attach": (with_steps(Split(), Budget(0.5)), "budget needs routers: put `att"),
    "refit before attach": (with_steps(Split(), Refit()), "refit needs routers: put `attach` bef"),
    "refit twice": (with_steps(Split(), Attach(), Refit(), Refit()), "the model has been refitted"),
    "no split": (with_steps(Attach()), "attach needs experts: put `split` before it"),
    "no attach": (with_steps(Split(), HARD), "train mode hard does not fit a dense model"),
    "dense after attach": (
        with_steps(Split(), Attach(), Train(tokens=64)),
        "train mode dense does not fit a routed model",
    ),
    "split after attach": (with_steps(Split(), Attach(), Split()), "is routed already"),
    "swap after attach": (
        with_steps(Split(), Attach(), Swap({"kind": "relu"})),
        "is routed already: start from the dense model",
    ),
    "activation": (with_steps(Swap({"kind": "drellu"})), "did you mean 'drelu'"),
    "theta": (with_steps(Swap({"kind": "fatrelu", "theta": -1})), "theta is -1, but must be"),
    "max_error": (with_steps(Swap({"kind": "relu"}, 0.1)), "swap: max_error chooses theta"),
    "swap without split": (
        with_steps(Swap({"kind": "relu"}), Attach()),
        "attach needs experts: put `split` before it",
    ),
    "attach twice": (with_steps(Split(), Attach(), Attach()), "is routed already"),
    "target of top-k": (
        with_steps(Split(), Attach(selector={"kind": "topk", "k": 2}), SOFT),
        "a target sparsity needs a threshold; with top-k, k sets the sparsity",
    ),
    "more than all experts": (
        with_steps(Split(), Attach(selector={"kind": "topk", "k": 7})),
        "top-k asks for 7 of 6 experts",
    ),
    "data": (lambda recipe: replace(recipe, data="no-such.txt"), "no-such.txt' is not there"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(
    mistake: str, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    change, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        run(change(recipe), str(work / "donor"), tmp_path / "out", **FP32)
    assert not list(tmp_path.iterdir())


def test_a_donor_that_is_not_there_or_not_whole(recipe: Recipe, work: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no/such/model"):
        run(recipe, "no/such/model", tmp_path / "out", **FP32)
    broken = shutil.copytree(work / "donor", tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        run(recipe, str(broken), tmp_path / "out", **FP32)
    assert not (tmp_path / "out").exists()


def test_an_encoder_can_be_split_and_attached_but_not_trained(
    recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    save(build("bert"), tmp_path / "bert", load_tokenizer(work / "donor"))
    with pytest.raises(ValueError, match="BertForMaskedLM is neither a causal language model"):
        run(recipe, str(tmp_path / "bert"), tmp_path / "out", **FP32)
    assert not (tmp_path / "out").exists()
    out = run(
        replace(recipe, steps=recipe.steps[:2]), str(tmp_path / "bert"), tmp_path / "out", **FP32
    )
    assert len(expert_ffns(load(out))) == 2


# --- killed


def always(*_: Any, **__: Any) -> bool:
    return True


def die_in(monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool] = always) -> None:
    """The pipeline dies instead of calling `name`."""
    modules = (pipeline, run_folder, attach_step, train_step, run_text)
    module = next(one for one in modules if hasattr(one, name))
    real = getattr(module, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, die)


DEATHS: dict[str, tuple[str, Callable[..., bool]]] = {
    "before the recipe is written": ("new_file", lambda path: path.name == "recipe.yaml"),
    "in a step": ("attach", lambda *args: args[1].start == "regression"),
    "before a step's folder": ("save", lambda _, folder, __: "3-train" in str(folder)),
    "before the folder is filled": ("link", lambda source, _: source.name == "config.json"),
    "before the folder is whole": ("link", lambda source, _: source.name == "tokenizer.json"),
    "before the metrics": ("new_file", lambda path: path.name == "metrics.json"),
}


@pytest.mark.parametrize("place", DEATHS)
def test_a_run_that_died_anywhere_is_completed(
    place: str,
    recipe: Recipe,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: Path,
) -> None:
    out = tmp_path / "out"
    die_in(monkeypatch, *DEATHS[place])
    with pytest.raises(Killed):
        run(recipe, str(work / "donor"), out, **FP32)
    assert not (out / "metrics.json").exists()
    monkeypatch.undo()
    run(recipe, str(work / "donor"), out, **FP32)
    assert same_weights(out, done)
    assert history(out) == history(done)
    assert not (out / "steps").exists()
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_a_marker_that_was_being_written_is_no_stranger(
    recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".recipe.yaml.partial").write_text("# donor: ")
    run(replace(recipe, steps=recipe.steps[:1]), str(work / "donor"), out, **FP32)
    assert not (out / ".recipe.yaml.partial").exists()


PROGRAM = """
import os, signal, sys, torch
from moe_tools.runs.run import run
from moe_tools.recipe import read_recipe
recipe, donor, out, event, path = sys.argv[1:]

def die(name, args):
    if name == event and str(args[0]).endswith(path):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
run(read_recipe(recipe), donor, out, dtype=torch.float32)
"""


def kill_9(event: str, path: str, recipe: Recipe, work: Path, out: Path) -> None:
    """The run, in a process of its own that is killed (-9) as it is about to touch a path."""
    file = out.with_name("recipe-to-run.yaml")
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-c", PROGRAM, str(file), str(work / "donor"), str(out), event, path]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (out / "metrics.json").exists()


def test_kill_9_between_steps_and_inside_one(
    recipe: Recipe, work: Path, tmp_path: Path, done: Path
) -> None:
    out = tmp_path / "out"
    steps = out / "steps"
    kill_9("os.mkdir", ".1-attach.partial", recipe, work, out)
    assert {path.name for path in steps.iterdir()} == {"0-split"}
    split = (steps / "0-split" / "model.safetensors").stat().st_mtime_ns

    kill_9("open", "checkpoint-6/trainer_state.json", recipe, work, out)
    assert {path.name for path in steps.iterdir()} == {"0-split", "1-attach", "2-train.work"}
    checkpoints = {path.name: path for path in (steps / "2-train.work").iterdir()}
    assert (checkpoints["checkpoint-4"] / "trainer_state.json").is_file()
    assert (checkpoints["checkpoint-6"] / "model.safetensors").is_file()
    assert not (checkpoints["checkpoint-6"] / "trainer_state.json").exists()

    run(recipe, str(work / "donor"), out, keep_steps=True, **FP32)
    assert (steps / "0-split" / "model.safetensors").stat().st_mtime_ns == split
    assert same_weights(out, done)
    assert history(out) == history(done)
    assert {p.name for p in steps.iterdir()} == {p.name for p in (done / "steps").iterdir()}


@pytest.mark.parametrize("router", [0, 1])
def test_a_run_that_died_inside_a_fit_is_completed(
    router: int, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moefied: Path
) -> None:
    recipe, out = untrained("moefication", work), tmp_path / "out"
    fit_module = importlib.import_module("moe_tools.steps.fit")
    real, calls = fit_module._fit_one, []

    def die(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == router + 1:
            raise Killed
        return real(*args)

    monkeypatch.setattr(fit_module, "_fit_one", die)
    with pytest.raises(Killed):
        run(recipe, str(work / "donor"), out, **FP32)
    kept = {path.name for path in (out / "steps").iterdir()}
    assert kept == {"0-split", "1-attach", "2-fit.work"}
    calls.clear()
    calls.extend([None] * 2)  # past the fatal one
    run(recipe, str(work / "donor"), out, **FP32)
    assert len(calls) == 2 + (2 - router)  # a finished router is not fitted again
    assert same_weights(out, moefied)
    for one, other in zip(metrics(out)["steps"], metrics(moefied)["steps"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert not (out / "steps").exists()


def test_kill_9_inside_a_fit(work: Path, tmp_path: Path, moefied: Path) -> None:
    recipe, out = untrained("moefication", work), tmp_path / "out"
    kill_9("open", "2-fit.work/.1.json.partial", recipe, work, out)
    unfinished = out / "steps" / "2-fit.work"
    assert {path.name for path in unfinished.iterdir()} == {
        "activations",
        "0.json",
        "0.safetensors",
        "1.safetensors",
    }
    run(recipe, str(work / "donor"), out, **FP32)
    assert same_weights(out, moefied)


def test_a_loss_that_is_not_finite_keeps_what_is_done(
    recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    wild = replace(recipe, steps=(*recipe.steps[:2], replace(SOFT, lr=1e30)))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="lower the learning rate"):
            run(wild, str(work / "donor"), tmp_path / "out", **FP32)
        kept = {path.name for path in (tmp_path / "out" / "steps").iterdir()}
        assert kept >= {"0-split", "1-attach"} and "2-train" not in kept
        assert not (tmp_path / "out" / "metrics.json").exists()


def test_the_public_run_is_this_one() -> None:
    assert moe_tools.run is run


def test_a_control_that_there_is_not_is_said_before_the_run(
    recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    """And not after hours of it, at every retry."""
    routers = Train(tokens=64, mode="straight", parts="routers")
    steps = (*recipe.steps[:2], routers)
    with pytest.raises(ValueError, match="trains nothing but routers: its dense control is the"):
        run(
            replace(recipe, steps=steps),
            str(work / "donor"),
            tmp_path / "out",
            control=True,
            **FP32,
        )
    assert not (tmp_path / "out").exists()
