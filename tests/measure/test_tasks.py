"""Tasks of the harness, and those of papers under one name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.measure.task_groups import GROUPS, TaskGroup
from moe_tools.measure.tasks import Asked, Tasks, begins_with_bos, run_tasks
from tests.data.test_protocols import starting
from tests.families import build
from tests.tiny import build_tokenizer

CHOICES = ["w1", "w2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks that need no hub: `one`, of no number of examples, and `two`, of one.

    The harness knows no others, which it would look for in 10,000 files.
    """
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "tasks"
    made.mkdir()
    for name, shots in (("one", ""), ("two", "num_fewshot: 1")):
        data = tmp_path / f"{name}.jsonl"
        rows = [{"q": f"w{n} w9", "choices": CHOICES, "answer": n % 2} for n in range(4)]
        data.write_text("\n".join(map(json.dumps, rows)))
        (made / f"{name}.yaml").write_text(
            f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
{shots}
"""
        )
    return made


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of both."""
    group = TaskGroup("a paper", {"one": 2, "two": None}, bos=True, lacks="the third one")
    monkeypatch.setitem(GROUPS, "paper", group)


@contextmanager
def prompts(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The rows that a model is given."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.extend(options["input_ids"] if "input_ids" in options else args[0])

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# --- what is asked


def test_a_paper_is_its_tasks_with_its_numbers_of_examples() -> None:
    asked = Tasks(("turbosparse",)).asked()
    assert [(one.name, one.shots) for one in asked] == [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 8),
        *((name, None) for name in ("piqa", "sciq", "arc_easy", "openbookqa")),
    ]
    assert {one.group for one in asked} == {"turbosparse"} and {one.bos for one in asked} == {None}


def test_the_command_line_knows_every_paper() -> None:
    from moe_tools.cli.options import PAPERS

    assert tuple(GROUPS) == PAPERS


def test_prosparse_asks_for_bos_and_the_user_has_the_last_word() -> None:
    assert {one.bos for one in Tasks(("prosparse",)).asked()} == {True}
    assert {one.bos for one in Tasks(("prosparse",), bos=False).asked()} == {False}
    assert {one.bos for one in Tasks(("lte", "piqa"), bos=True).asked()} == {True}


def test_what_two_papers_ask_alike_is_asked_once() -> None:
    asked = Tasks(("teal", "lte", "turbosparse", "piqa", "piqa")).asked()
    assert [one.shots for one in asked if one.name == "mmlu"] == [5]
    assert [one.shots for one in asked if one.name == "gsm8k"] == [5, 8]
    assert [one.shots for one in asked if one.name == "piqa"] == [0, None]


def test_a_figure_says_how_it_was_asked() -> None:
    assert Asked("one").figure("one", "acc") == "one acc"
    assert Asked("one", "p", 5, bos=True).figure("one", "acc") == "one 5-shot BOS acc"
    assert Asked("one", bos=False).figure("one", "acc") == "one no-BOS acc"


def test_bos_is_of_tasks() -> None:
    with pytest.raises(ValueError, match="--bos is of the prompts of tasks: name some by --tasks"):
        Tasks(bos=True).check()
    Tasks().check()


def test_a_tokenizer_without_bos_cannot_begin_with_it(caplog: pytest.LogCaptureFixture) -> None:
    assert begins_with_bos(starting()) and not begins_with_bos(build_tokenizer())
    with pytest.raises(ValueError, match="begins no text with BOS: leave --bos out"):
        Tasks(("one",), bos=True).check_bos(build_tokenizer())
    Tasks(("one",), bos=True).check_bos(starting())
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        Tasks(("prosparse",)).check_bos(build_tokenizer())
    assert caplog.messages == [
        "prosparse asks for BOS before every prompt, and the tokenizer begins with none"
    ]


# --- the harness


@pytest.mark.slow
def test_every_task_of_a_paper_is_one_of_the_harness_and_no_paper_is() -> None:
    manager = Tasks().manager()
    for name, group in GROUPS.items():
        assert manager.match_tasks([name]) == []
        assert [task for task in group.shots if manager.match_tasks([task]) != [task]] == []


def test_tasks_of_a_paper_that_are_not_there_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GROUPS, "paper", TaskGroup("a paper", {"one": 0, "no_such_task": 0}))
    with pytest.raises(ValueError, match="has no task 'no_such_task' of paper: `lm_eval ls tasks"):
        Tasks(("paper",), str(folder)).check()


def test_a_task_of_ones_own_may_not_hide_a_paper(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GROUPS, "two", TaskGroup("a paper", {"one": 0}))
    with pytest.raises(ValueError, match=r"'two' is a paper's group .* one by one \(one\)"):
        Tasks(("two",), str(folder)).check()
    Tasks(("one",), str(folder)).check()


def test_a_task_whose_data_are_not_there_is_refused_before_the_model(folder: Path) -> None:
    (folder.parent / "two.jsonl").unlink()
    with pytest.raises(ValueError, match="task 'two' cannot be read: ") as error:
        Tasks(("one", "two"), str(folder)).check()
    assert "\n" not in str(error.value)


def test_a_task_that_runs_code_is_refused(folder: Path) -> None:
    task = folder / "one.yaml"
    task.write_text(f"{task.read_text()}\nunsafe_code: true\n")
    with pytest.raises(ValueError, match="task 'one' runs code that a model wrote, and moe-tools"):
        Tasks(("one",), str(folder)).check()


@pytest.mark.parametrize(("bos", "how"), [(None, "BOS"), (False, "no-BOS")])
def test_a_paper_is_run_with_its_examples_and_its_bos(
    bos: bool | None, how: str, folder: Path, paper: None, caplog: pytest.LogCaptureFixture
) -> None:
    tasks, tokenizer = Tasks(("paper",), str(folder), bos=bos), starting()
    model = build("llama")
    with caplog.at_level(logging.WARNING, logger="moe_tools"):
        tasks.check()
    assert "paper: not asked: the third one" in caplog.messages
    with prompts(model) as seen:
        figures = run_tasks(model, tokenizer, tasks, batch_size=1)
    assert list(figures) == [f"one 2-shot {how} acc", f"two {how} acc"]
    begins = [int(row[0]) == tokenizer.bos_token_id for row in seen]
    assert begins == [how == "BOS"] * len(seen) and len(seen) >= 8
    # a question is two words, an example three; the answer's last token is not given
    lengths = sorted({len(row) - (how == "BOS") for row in seen})
    assert lengths == [5, 8]


def test_a_figure_of_a_task_is_that_of_the_model(folder: Path) -> None:
    """And a task that is named itself is asked as the harness does it."""
    model, tokenizer = build("llama"), build_tokenizer()
    right = []
    for n in range(4):
        prompt = torch.tensor([tokenizer(f"w{n} w9")["input_ids"]])
        with torch.no_grad():
            logits_V = model(input_ids=prompt).logits[0, -1]
        said = logits_V[tokenizer.convert_tokens_to_ids(CHOICES)].argmax().item()
        right.append(said == n % 2)
    figures = run_tasks(model, tokenizer, Tasks(("one",), str(folder)), batch_size=2)
    assert figures == {"one acc": pytest.approx(sum(right) / 4)}


def test_the_parts_of_a_papers_task_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\n"
    )
    monkeypatch.setitem(GROUPS, "paper", TaskGroup("a paper", {"both": 0}))
    model, tokenizer = build("llama"), build_tokenizer()
    whole = run_tasks(model, tokenizer, Tasks(("both",), str(folder)), batch_size=4)
    assert set(whole) == {"both acc", "one acc", "two acc"}
    asked = run_tasks(model, tokenizer, Tasks(("paper",), str(folder)), batch_size=4)
    assert set(asked) == {"both 0-shot acc"}


def test_a_figure_without_bos_does_not_say_that_it_has_one(folder: Path, paper: None) -> None:
    figures = run_tasks(
        build("llama"), build_tokenizer(), Tasks(("paper",), str(folder)), batch_size=4
    )
    assert list(figures) == ["one 2-shot acc", "two acc"]
