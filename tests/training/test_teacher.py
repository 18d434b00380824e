"""Where a teacher is: whole, on disk, in the memory of the CPU; what is refused of it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from moe_tools.data import Batch
from moe_tools.recipe import Recipe, Train, parse_recipe
from moe_tools.steps.launch import Launch
from moe_tools.steps.step import Setting
from moe_tools.training import cached_teacher
from moe_tools.training.cached_teacher import CachedTeacher, as_logp, bytes_each
from moe_tools.training.teacher import Donor, check_teacher, lent_by_cpu
from moe_tools.training.train import train
from moe_tools.training.watch import watch_ffns
from tests.families import FAMILIES, build, randomize
from tests.killed import Killed, kill_at
from tests.training.test_train import DENSE, SOFT, converted, equal, state, text

TAUGHT = replace(SOFT, losses={"lm": 1.0, "distill": 1.0})
CACHED = replace(TAUGHT, teacher="cached")


def donor() -> PreTrainedModel:
    """A teacher with opinions of its own."""
    torch.manual_seed(1)
    model = build("llama")
    randomize(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


# --- on disk


def test_all_of_its_tokens_teach_as_the_teacher_does(tmp_path: Path) -> None:
    """But for fp16, which rounds a probability by 0.4 % at most."""
    memory, disk = converted(), converted()
    before = state(memory)
    wanted = train(memory, TAUGHT, text(32), tmp_path / "a", donor=donor())
    step = replace(CACHED, teacher_top_k=1000)
    found = train(disk, step, text(32), tmp_path / "b", donor=donor())
    assert wanted["distill"] > 0.1
    assert found["distill"] == pytest.approx(wanted["distill"], rel=1e-2)
    assert found["lm"] == pytest.approx(wanted["lm"], rel=1e-3)
    for name, value in memory.state_dict().items():
        moved = (value - before[name]).norm()
        assert (disk.state_dict()[name] - value).norm() <= 0.1 * moved, name


def test_some_of_its_tokens_teach_less(tmp_path: Path) -> None:
    losses = [
        train(converted(), step, text(32), tmp_path / str(step.teacher_top_k), donor=donor())
        for step in (replace(CACHED, teacher_top_k=k) for k in (1, 8, 1000))
    ]
    found = [each["distill"] for each in losses]
    assert 0 < found[0] < found[1] < found[2]


def test_no_teacher_is_in_memory_while_the_student_learns(tmp_path: Path) -> None:
    seen: list[Any] = []

    def load(_: str) -> PreTrainedModel:
        model = donor()
        seen.append(weakref.ref(model))
        return model

    model = converted()

    def look(*_: Any) -> None:
        gc.collect()
        assert [ref() for ref in seen] == [None]

    model.register_forward_pre_hook(look)
    train(model, CACHED, text(16), tmp_path, donor=Donor(load, "nowhere"))
    assert len(seen) == 1
    again = converted()
    train(again, CACHED, text(16), tmp_path, donor=Donor(load, "nowhere"))  # from its end
    assert len(seen) == 1


def test_writing_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_teacher, "TOGETHER", 2)
    killed, teacher = donor(), donor()
    kill_at(killed, 4)  # in the second of four files
    with pytest.raises(Killed):
        train(converted(), CACHED, text(28), tmp_path / "killed", donor=killed)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    teacher.base_model.register_forward_pre_hook(count)
    resumed, through = converted(), converted()
    train(resumed, CACHED, text(28), tmp_path / "killed", donor=teacher)
    assert passes == 5  # of 7 batches
    train(through, CACHED, text(28), tmp_path / "through", donor=donor())
    assert equal(resumed, through)


def test_each_batch_reads_its_own_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where batches have different sizes, in several files."""
    monkeypatch.setattr(cached_teacher, "TOGETHER", 2)
    teacher, blocks_BT = donor(), text(9)
    batches = [Batch(ids_BT) for ids_BT in blocks_BT.split([1, 3, 2, 1, 2])]
    cached = CachedTeacher(tmp_path, len(batches))
    cached.write(lambda: teacher, batches, 5)
    assert not cached.missing
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"0000000{n}.safetensors" for n in (0, 2, 4)]
    stored = sum(file.stat().st_size for file in files)
    assert stored - 9 * 16 * bytes_each(5) < 1000  # headers
    for index, batch in enumerate(batches):
        said = cached[index]
        with torch.no_grad():
            exact_TV = teacher(input_ids=batch.ids_BT).logits.flatten(0, 1).log_softmax(-1)
        top = exact_TV.topk(5)
        assert torch.equal(said["teacher_ids"].long(), top.indices)
        logp_TL = as_logp(said["teacher_logp"])
        assert (logp_TL[:, :5] - top.values).abs().max() < 0.01
        rest_T = 1 - top.values.exp().sum(-1)
        assert (logp_TL[:, 5].exp() - rest_T).abs().max() < 2e-3


def test_a_classifier_learns_from_the_classes_of_a_cached_teacher(tmp_path: Path) -> None:
    def classifier(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        sizes = FAMILIES["bert"].sizes | {"num_labels": 3}
        return BertForSequenceClassification(BertConfig(**sizes)).eval()

    batches = [Batch(ids_BT, torch.tensor([0, 1, 2, 1])) for ids_BT in text(16).split(4)]
    found = []
    for place in ("whole", "cached"):
        step = replace(DENSE, losses={"lm": 1.0, "distill": 1.0}, teacher=place)
        teacher = classifier(1)
        with torch.no_grad():
            teacher.classifier.weight.mul_(50)
        found.append(train(classifier(0), step, batches, tmp_path / place, donor=teacher))
    assert found[0]["distill"] > 0.01
    assert found[1]["distill"] == pytest.approx(found[0]["distill"], rel=2e-2)


def test_a_dry_run_knows_its_size() -> None:
    step = replace(CACHED, tokens=1600, teacher_top_k=8)
    with torch.device("meta"):
        model = converted_shapes()
    cost = step.cost(model, Setting(16, 1, teacher_bytes=1000))
    assert cost.disk == 1600 * (8 * 6 + 2)
    assert cost.states is not None and cost.states.teacher == 0
    whole = replace(step, teacher="whole").cost(model, Setting(16, 1, teacher_bytes=1000))
    assert whole.disk == 0 and whole.states is not None and whole.states.teacher == 1000
    sharded = replace(step, teacher="sharded").cost(model, Setting(16, 1, teacher_bytes=1000))
    assert sharded.states is not None
    assert sharded.teacher == "sharded"
    kept = [sharded.states.per_process(3, 4, where) for where in ("whole", sharded.teacher)]
    assert kept[0] - kept[1] == pytest.approx(750)


def converted_shapes() -> PreTrainedModel:
    return build("llama").to("meta")


# --- in the memory of the CPU


def test_weights_come_from_the_cpu_for_one_module_at_a_time() -> None:
    """What it computes, and what its FFNs give, stays; here the device is the CPU, too."""
    plain, lent = donor(), lent_by_cpu(donor(), torch.device("cpu"))
    assert all(param.is_meta for param in lent.parameters())
    with watch_ffns(plain, {"outputs"}) as wanted, watch_ffns(lent, {"outputs"}) as found:
        assert torch.equal(lent(text(2)).logits, plain(text(2)).logits)
    assert wanted.outputs.keys() == found.outputs.keys()
    assert all(torch.equal(y_TD, found.outputs[name]) for name, y_TD in wanted.outputs.items())
    assert all(param.is_meta for param in lent.parameters())


def test_without_a_gpu_an_offloaded_teacher_is_whole(tmp_path: Path) -> None:
    whole, offloaded = converted(), converted()
    train(whole, TAUGHT, text(16), tmp_path / "a", donor=donor())
    step = replace(TAUGHT, teacher="offloaded")
    train(offloaded, step, text(16), tmp_path / "b", donor=donor())
    assert equal(whole, offloaded)


# --- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"lm": 1.0}}, "teacher cached needs a loss that has a teacher"),
        ({"losses": {"distill": 1.0, "distill_ffn": 1.0}}, "distill_ffn compares the outputs"),
        ({"teacher_top_k": 0}, "teacher_top_k"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        replace(CACHED, **changes).check()
    assert "\n" not in str(refused.value)


def test_a_recipe_names_the_places() -> None:
    block = {"mode": "dense", "tokens": 16, "losses": {"distill": 1.0}, "teacher": "elsewhere"}
    with pytest.raises(ValueError, match=r"elsewhere.*cached, offloaded, sharded, whole"):
        parse_recipe({"name": "x", "steps": [{"train": block}]})


def test_a_sharded_teacher_needs_zero3() -> None:
    step = replace(TAUGHT, teacher="sharded")
    zero2 = Launch(deepspeed={"zero_optimization": {"stage": 2}})
    for launch in (Launch(), zero2):
        with pytest.raises(ValueError, match="teacher sharded needs ZeRO-3"):
            check_teacher(step, launch, "nowhere")
    zero3 = Launch(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="a GGUF file is read as a whole: use whole or cached"):
        check_teacher(step, zero3, "model.gguf")


def test_the_dense_control_has_no_teacher() -> None:
    recipe = Recipe("x", (replace(CACHED, tokens=16),))
    (step,) = recipe.train_steps
    control = step.control()
    assert isinstance(control, Train)
    control.check()
    assert control.teacher == "whole" and not control.needs_donor()
