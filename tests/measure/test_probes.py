"""Probes: questions have one right answer, models that know it are right, and chance is chance."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_tools.measure.probes import CHANCE, CHOICES, PROBES, run_probes
from tests.families import build
from tests.tiny import build_tokenizer

every_probe = pytest.mark.parametrize("name", PROBES)


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class Knowing(nn.Module):
    """Gives the next character of lines that it knows the highest logit, else all the same."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.lines = lines

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, 128)
        for row, ids in enumerate(input_ids.tolist()):
            for at in range(len(ids)):
                begun = "".join(map(chr, ids[: at + 1]))
                for line in self.lines:
                    if line.startswith(begun) and len(line) > len(begun):
                        logits[row, at, ord(line[len(begun)])] = 9.0
        return SimpleNamespace(logits=logits)


def asked(name: str, count: int, seed: int = 0) -> list[Any]:
    draw = random.Random(f"{name} {seed}")
    return [PROBES[name](draw) for _ in range(count)]


@every_probe
@given(st.integers(0, 10_000))
def test_a_question_has_a_few_answers_and_one_is_right(name: str, seed: int) -> None:
    prompt, answers = PROBES[name](random.Random(seed))
    assert len(answers) == len(set(answers)) == CHOICES
    right = answers[0].strip()
    *shown, last = prompt.splitlines()
    match name:
        case "arithmetic":
            for line in [*shown, f"{last} {right}"]:
                sum_, value = line.split(" = ")
                assert eval(sum_) == int(value)
        case "copying":
            said = last.split()
            assert shown[0].split()[: len(said) + 1] == [*said, right]
        case "recall":
            assert f"{last} {right}" in shown
        case "pattern":
            pairs = [line.split(" -> ") for line in shown]
            rules = {
                rule
                for rule in ("{0}", "{1}", "{1} {0}")
                if all(rule.format(*given.split()) == made for given, made in pairs)
            }
            assert {rule.format(*last.split()[:2]) for rule in rules} == {right}


@every_probe
def test_who_knows_is_right_and_who_knows_the_wrong_is_not(name: str) -> None:
    questions = asked(name, 6)
    right = [f"{one.prompt}{one.answers[0]}\n" for one in questions]
    wrong = [f"{one.prompt}{one.answers[2]}\n" for one in questions]
    for lines, expected in ((right, 1.0), (wrong, 0.0), (right[:3] + wrong[3:], 0.5)):
        found = run_probes(Knowing(lines), Letters(), 6)
        assert found[f"probe {name}"] == expected


def test_who_knows_nothing_is_right_by_chance() -> None:
    """A random model's opinions are as good as guessing: four standard errors of 120 answers."""
    torch.manual_seed(0)
    found = run_probes(build("llama", vocab_size=300), Letters(), 120, batch_size=8)
    assert set(found) == {f"probe {name}" for name in PROBES}
    for name in ("copying", "recall"):
        assert abs(found[f"probe {name}"] - CHANCE) < 4 * (CHANCE * (1 - CHANCE) / 120) ** 0.5


def test_the_batch_changes_nothing_and_the_seed_does() -> None:
    torch.manual_seed(0)
    model = build("llama", vocab_size=300)
    once = run_probes(model, Letters(), 12, batch_size=1)
    assert once == run_probes(model, Letters(), 12, batch_size=5)
    assert asked("recall", 3) != asked("recall", 3, seed=1)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="--probes is 0, but must be at least 1"):
        run_probes(build("llama"), build_tokenizer(), 0)
    with pytest.raises(ValueError, match="continues no text: --probes cannot ask it"):
        run_probes(build("bert"), build_tokenizer(), 4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration continues no text"):
        run_probes(build("t5-relu"), build_tokenizer(), 4)
