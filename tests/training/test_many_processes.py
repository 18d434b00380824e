"""Sixty-four processes: which rows each of them sees, in which order, and after a stop.

Sixty-four real ones are too many for a small machine. What decides who sees what is real here: the
text of a run, its batches, our Trainer's sampler, and the loader that Accelerate prepares for
process i of 64, which is told so by two properties of its Accelerator. Four real processes over
gloo stand at the end of this file, and `test_distributed.py` has two.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, skip_first_batches
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_tools import processes
from moe_tools.data import Batch, Batches
from moe_tools.recipe import Recipe, Train
from moe_tools.runs.text import RunText
from moe_tools.steps.launch import Launch
from moe_tools.training.arguments import batch_of
from moe_tools.training.batches import whole_batches
from moe_tools.training.checkpoints import newest_checkpoint
from moe_tools.training.parts import trainable_parts
from moe_tools.training.teacher import Teaching
from moe_tools.training.trainer import RecipeTrainer
from tests.killed import Killed, kill_at
from tests.tiny import WORDS, build_tokenizer
from tests.training.test_distributed import start

PROCESSES = 64
LENGTH = 8
STEP = Train(tokens=1, batch_size=2, accumulate=2, checkpoint_every=1)
ROWS = STEP.batch_size * STEP.accumulate * PROCESSES
"""Of one optimizer step."""
Row = tuple[int, ...]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a, b, c.jsonl in the current folder, each of its own words: a row says where it is from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for index, name in enumerate("abc"):
        words = WORDS[20 * index : 20 * index + 20]
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=79))}) for _ in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def source_of(row: Row) -> str:
    """Which file a row is from; EOS, which ends every text, says nothing."""
    (name,) = {"abc"[(token - 3) // 20] for token in row if token > 2}
    return name


def tiny() -> PreTrainedModel:
    """A model of one layer for the words of the texts."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))


def text_of(recipe: Recipe, work: Path, monkeypatch: pytest.MonkeyPatch) -> list[Batches]:
    """The text of each train step, as `train` cuts it for all processes."""
    text = RunText(recipe, build_tokenizer(), work, tiny)
    found = []
    with monkeypatch.context() as context:
        context.setattr(processes, "count", lambda: PROCESSES)
        for index in range(len(recipe.steps)):
            batches = whole_batches(text.of_step(index), recipe.train_steps[index])
            assert isinstance(batches, Batches)
            found.append(batches)
    return found


def trainer_of(batches: Batches, work: Path, model: PreTrainedModel | None = None) -> RecipeTrainer:
    """The trainer of one of the processes, as `train` makes it."""
    model = model or tiny()
    steps = len(batches) // (STEP.accumulate * PROCESSES)
    groups = trainable_parts(model, STEP)
    return RecipeTrainer(model, STEP, batches, work, steps, groups, Teaching(), 0, Launch())


def be(monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    """From here on Accelerate prepares loaders for this process of 64."""
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: PROCESSES))
    monkeypatch.setattr(Accelerator, "process_index", property(lambda _: process))


def rows_of(batch: Batch) -> list[Row]:
    """The rows of a batch, without padding; of a packed one, the texts in it."""
    if batch.positions_BT is not None:
        starts = [i for i, at in enumerate(batch.positions_BT[0].tolist()) if at == 0]
        ids = batch.ids_BT[0].tolist()
        ends = [*starts[1:], len(ids)]
        return [tuple(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    if batch.mask_BT is not None:
        pairs = zip(batch.ids_BT, batch.mask_BT, strict=True)
        return [tuple(ids_T[mask_T].tolist()) for ids_T, mask_T in pairs]
    return [tuple(ids_T.tolist()) for ids_T in batch.ids_BT]


def all_rows(batches: Sequence[Batch]) -> list[list[Row]]:
    """The rows of every batch."""
    return [rows_of(batch) for batch in batches]


def loaded(
    batches: Batches, work: Path, monkeypatch: pytest.MonkeyPatch, *, after: int = 0
) -> list[list[list[Row]]]:
    """Process -> batch -> rows; `after` so many optimizer steps, as a Trainer that resumes."""
    trainer, found = trainer_of(batches, work), []
    for process in range(PROCESSES):
        be(monkeypatch, process)
        loader = trainer.get_train_dataloader()
        if after:
            loader = skip_first_batches(loader, after * STEP.accumulate)
        found.append([rows_of(batch_of(item)) for item in loader])
    return found


def in_order(seen: list[list[list[Row]]]) -> list[list[Row]]:
    """The batches of all processes in the order in which they are trained on: pass by pass."""
    return [batch for taken in zip(*seen, strict=True) for batch in taken]


def recipe_of(data: str, *trains: Train, **fields: Any) -> Recipe:
    return Recipe("many", trains, data=data, block_length=LENGTH, **fields)


# --- every row, once, in order


@pytest.mark.parametrize("packing", ["joined", "padded", "isolated"])
def test_every_row_is_seen_once_by_one_process_in_the_order_of_the_text(
    packing: Any, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("a.jsonl", replace(STEP, tokens=100_000), packing=packing)
    recipe = replace(recipe, block_length=LENGTH if packing == "joined" else 80)
    if packing != "joined":  # a text is a row: shorter ones, of which a block holds two and more
        draw = random.Random(1)
        lines = [" ".join(draw.choices(WORDS, k=draw.randrange(20, 50))) for _ in range(1500)]
        body = "\n".join(json.dumps({"text": line}) for line in lines)
        (texts / "a.jsonl").write_text(body)
    (batches,) = text_of(recipe, texts, monkeypatch)
    seen = loaded(batches, texts / "work", monkeypatch)
    assert in_order(seen) == all_rows(batches)
    each = Counter(row for process in seen for batch in process for row in batch)
    assert set(each.values()) == {1}  # nothing twice, by nobody
    assert {len(process) for process in seen} == {len(batches) // PROCESSES}
    assert len(batches) >= 2 * STEP.accumulate * PROCESSES  # two optimizer steps and more
    assert len(batches) % (STEP.accumulate * PROCESSES) == 0


def test_what_is_left_out_is_less_than_one_optimizer_step_at_the_end(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("a.jsonl", replace(STEP, tokens=100_000))
    whole = RunText(recipe, build_tokenizer(), texts, tiny).of_step(0)
    (batches,) = text_of(recipe, texts, monkeypatch)
    assert all_rows(batches) == all_rows(whole)[: len(batches)]  # type: ignore[arg-type]
    assert 0 < len(whole) - len(batches) < STEP.accumulate * PROCESSES


def test_rows_on_the_disk_are_handed_out_as_those_in_memory(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("a.jsonl", replace(STEP, tokens=8 * ROWS * LENGTH))
    (in_memory,) = text_of(recipe, texts, monkeypatch)
    monkeypatch.setattr("moe_tools.data.packing.IN_MEMORY", 1)
    (on_disk,) = text_of(recipe, texts, monkeypatch)
    assert list((texts / "cache" / "moe_tools" / "text").glob("*/00000.ids"))
    seen = loaded(on_disk, texts / "work", monkeypatch)
    assert in_order(seen) == all_rows(in_memory)


def test_two_train_steps_share_the_text(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = (replace(STEP, tokens=count * ROWS * LENGTH) for count in (6, 3))
    both = text_of(recipe_of("a.jsonl", soft, hard), texts, monkeypatch)
    (alone,) = text_of(
        recipe_of("a.jsonl", replace(STEP, tokens=9 * ROWS * LENGTH)), texts, monkeypatch
    )
    seen = [in_order(loaded(each, texts / "work", monkeypatch)) for each in both]
    assert [len(each) for each in seen] == [6 * ROWS // 2, 3 * ROWS // 2]
    assert seen[0] + seen[1] == all_rows(alone)


# --- stops


def test_after_a_stop_at_any_optimizer_step_the_rest_follows(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batches,) = text_of(recipe_of("a.jsonl", replace(STEP, tokens=100_000)), texts, monkeypatch)
    whole = loaded(batches, texts / "work", monkeypatch)
    steps = len(batches) // (STEP.accumulate * PROCESSES)
    assert steps > 5
    for stop in range(1, steps):
        rest = loaded(batches, texts / "work", monkeypatch, after=stop)
        assert rest == [process[stop * STEP.accumulate :] for process in whole]


@pytest.mark.parametrize("process", [0, 37, 63])
def test_a_trainer_that_is_killed_goes_on_with_its_own_rows(
    process: int, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process of 64 trains for itself, by the Trainer's own loop; its rows are recorded."""
    recipe = recipe_of("a.jsonl", replace(STEP, tokens=4 * ROWS * LENGTH))
    (batches,) = text_of(recipe, texts, monkeypatch)
    be(monkeypatch, process)
    wanted = all_rows(batches)[process::PROCESSES]
    work, seen = texts / "work", list[list[Row]]()
    model = tiny()
    record(model, seen)
    kill_at(model, 2 * STEP.accumulate + 2)  # in the second pass of the third of four steps
    with pytest.raises(Killed):
        trainer_of(batches, work, model).train()
    assert seen == wanted[: 2 * STEP.accumulate + 2]
    seen.clear()
    model = tiny()
    record(model, seen)
    trainer_of(batches, work, model).train(resume_from_checkpoint=newest_checkpoint(work))
    assert seen == wanted[2 * STEP.accumulate :]


def record(model: PreTrainedModel, seen: list[list[Row]]) -> None:
    """Keeps the rows of every forward pass."""

    def see(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        seen.append([tuple(ids_T.tolist()) for ids_T in inputs["input_ids"]])

    model.base_model.register_forward_pre_hook(see, with_kwargs=True)


# --- mixtures and epochs


def test_shares_of_a_mixture_hold_at_every_optimizer_step(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    data = " + ".join(f"{name}.jsonl:{share}" for name, share in shares.items())
    recipe = recipe_of(data, replace(STEP, tokens=10 * ROWS * LENGTH))
    (batches,) = text_of(recipe, texts, monkeypatch)
    seen = in_order(loaded(batches, texts / "work", monkeypatch))
    rows = [row for batch in seen for row in batch]
    assert len(rows) == 10 * ROWS
    for end in range(ROWS, len(rows) + 1, ROWS):
        taken = Counter(map(source_of, rows[:end]))
        of_step = Counter(map(source_of, rows[end - ROWS : end]))
        for name, share in shares.items():
            assert abs(taken[name] - share * end) <= 1  # from the start, to one row
            assert abs(of_step[name] - share * ROWS) <= 2


def test_a_mixture_goes_on_after_a_stop(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("a.jsonl:2 + b.jsonl:1", replace(STEP, tokens=6 * ROWS * LENGTH))
    (batches,) = text_of(recipe, texts, monkeypatch)
    whole = loaded(batches, texts / "work", monkeypatch)
    rest = loaded(batches, texts / "work", monkeypatch, after=4)
    assert rest == [process[4 * STEP.accumulate :] for process in whole]


def test_epochs_reshuffle_and_each_has_every_row_once(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("a.jsonl", replace(STEP, tokens=0, epochs=2.5))
    once = RunText(
        recipe_of("a.jsonl", replace(STEP, tokens=10**6)), build_tokenizer(), texts, tiny
    )
    text = [row for batch in all_rows(once.of_step(0)) for row in batch]  # type: ignore[arg-type]
    (batches,) = text_of(recipe, texts, monkeypatch)
    seen = [
        row for batch in in_order(loaded(batches, texts / "work", monkeypatch)) for row in batch
    ]
    size = len(text)
    assert seen[:size] == text  # the first time in the order of the text
    second, third = seen[size : 2 * size], seen[2 * size :]
    assert Counter(second) == Counter(text) and second != text
    assert not Counter(third) - Counter(text) and third != second[: len(third)]
    assert 0 <= 2.5 * size - len(seen) < ROWS + 1
    rest = in_order(loaded(batches, texts / "work", monkeypatch, after=size // ROWS + 1))
    assert [row for batch in rest for row in batch] == seen[(size // ROWS + 1) * ROWS :]


# --- real ones


@pytest.mark.slow
def test_four_real_processes_see_every_row_once_and_go_on_after_a_stop(tmp_path: Path) -> None:
    """Over gloo, in one epoch and a half; all are stopped in the second of three steps."""
    done = start(4, "rows", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    text = found[0]["text"]
    steps, passes = 3, 2
    for rank, process in enumerate(found):
        wanted = text[rank::4][: steps * passes]
        assert process["text"] == text
        assert process["killed"] == wanted[: passes + 1]
        assert process["resumed"] == wanted[passes:]
