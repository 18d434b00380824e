"""Questions that need no data set: what a model lost that its perplexity does not show.

Sparse models keep their perplexity and lose reasoning first (Sirius, arXiv 2409.03856). Each probe
draws questions from a seed, with one right answer among a few; the answer of highest probability,
its tokens and the end of its line, is the model's.

Letters: B answers of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.data.generate import evaluating
from moe_tools.data.limits import continues_text

WORDS = (
    *("river", "stone", "window", "garden", "silver", "letter", "winter", "market", "bridge"),
    *("candle", "forest", "mirror", "pocket", "shadow", "ticket", "valley", "hammer", "island"),
    *("jacket", "kitchen", "ladder", "needle", "orange", "pepper", "rabbit", "saddle", "tunnel"),
    *("violin", "wallet", "yellow", "basket", "copper", "dinner", "engine", "finger", "guitar"),
)
"""Common words of about one token each."""
CHOICES = 4
"""Answers of a question."""


class Question(NamedTuple):
    """A prompt and its answers; the first one is right."""

    prompt: str
    answers: tuple[str, ...]


Probe = Callable[[random.Random], Question]
"""Draws a question."""


def arithmetic(draw: random.Random) -> Question:
    """A sum or a difference below 100, after three others; wrong ones are off by 1, 2 or 10."""

    def solved() -> tuple[str, int]:
        first, second = draw.randint(11, 89), draw.randint(2, 9)
        if draw.random() < 0.5:
            return f"{first} + {second} =", first + second
        return f"{first} - {second} =", first - second

    shown = [solved() for _ in range(4)]
    *before, (asked, right) = shown
    prompt = "".join(f"{text} {value}\n" for text, value in before) + asked
    wrong = draw.sample([right - 1, right + 1, right - 2, right + 2, right + 10], CHOICES - 1)
    return Question(prompt, tuple(f" {value}" for value in (right, *wrong)))


def copying(draw: random.Random) -> Question:
    """The word that comes next in the second saying of a list of twelve."""
    words = draw.sample(WORDS, 12)
    at = draw.randint(3, 10)
    prompt = f"{' '.join(words)}\n{' '.join(words[:at])}"
    wrong = draw.sample([word for word in words[:at] + words[at + 1 :]], CHOICES - 1)
    return Question(prompt, tuple(f" {word}" for word in (words[at], *wrong)))


def recall(draw: random.Random) -> Question:
    """The number that stood beside a name, among eight."""
    names = draw.sample(WORDS, 8)
    numbers = draw.sample(range(10, 100), 8)
    at = draw.randrange(8)
    lines = "".join(f"{name}: {number}\n" for name, number in zip(names, numbers, strict=True))
    wrong = draw.sample(numbers[:at] + numbers[at + 1 :], CHOICES - 1)
    return Question(f"{lines}{names[at]}:", tuple(f" {one}" for one in (numbers[at], *wrong)))


def pattern(draw: random.Random) -> Question:
    """What a rule makes of a new word, after five examples: the last word, the first, or a twin."""
    rule = draw.choice(["{0}", "{1}", "{1} {0}"])
    pairs = [draw.sample(WORDS, 2) for _ in range(6)]
    shown = "".join(f"{a} {b} -> {rule.format(a, b)}\n" for a, b in pairs[:-1])
    first, second = pairs[-1]
    right = rule.format(first, second)
    made = [first, second, f"{second} {first}", f"{first} {second}"]
    return Question(f"{shown}{first} {second} ->", tuple(f" {one}" for one in _first(right, made)))


def _first(right: str, made: Sequence[str]) -> list[str]:
    return [right, *(one for one in made if one != right)][:CHOICES]


PROBES: dict[str, Probe] = {
    "arithmetic": arithmetic,
    "copying": copying,
    "recall": recall,
    "pattern": pattern,
}
CHANCE = 1 / CHOICES


def check_asked(model: PreTrainedModel) -> None:
    """Whether a model, maybe without its weights, can be asked.

    Raises:
        ValueError: it continues no text.
    """
    if not continues_text(model):
        raise ValueError(f"{type(model).__name__} continues no text: --probes cannot ask it")


@torch.no_grad()
def run_probes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: int,
    *,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Asks a causal language model, as it stands.

    Args:
        model: routers, selectors and baselines included.
        tokenizer: its own.
        questions: of each probe; of 200, the standard error of an accuracy is 3 points.
        batch_size: questions of one forward pass.
        seed: what is drawn; models compare on the same questions.

    Returns:
        "probe NAME" -> the share of right answers; `CHANCE` is that of guessing.

    Raises:
        ValueError: no question, or a model that continues no text.
    """
    check_asked(model)
    if questions < 1:
        raise ValueError(f"--probes is {questions}, but must be at least 1")
    found = {}
    with evaluating(model):
        for name, probe in PROBES.items():
            draw = random.Random(f"{name} {seed}")
            drawn = [probe(draw) for _ in range(questions)]
            together = (drawn[at : at + batch_size] for at in range(0, questions, batch_size))
            hits = sum(_hits(model, tokenizer, some) for some in together)
            found[f"probe {name}"] = hits / questions
    return found


def _hits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> int:
    """How many questions a model answers right; a tie with the right answer is no hit."""
    rows = [row for question in questions for row in _rows(tokenizer, question)]
    scores = iter(_scores_B(model, rows).tolist())
    hits = 0
    for question in questions:
        right, *wrong = [next(scores) for _ in question.answers]
        hits += right > max(wrong)
    return hits


class _Row(NamedTuple):
    """The tokens of a prompt with one answer."""

    ids: list[int]
    prompt: int
    """How many are the prompt's."""


def _rows(tokenizer: PreTrainedTokenizerBase, question: Question) -> Iterator[_Row]:
    """Prompt and answer are tokenised together, as the model saw text; both may share no token."""
    before = tokenizer(question.prompt)["input_ids"]
    for answer in question.answers:
        ids = tokenizer(f"{question.prompt}{answer}\n")["input_ids"]
        same = (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b)
        yield _Row(ids, next(same, min(len(before), len(ids))))


def _scores_B(model: PreTrainedModel, rows: Sequence[_Row]) -> Tensor:
    """The log probability of every answer after its prompt."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    mask_BT = torch.tensor([[i < len(row.ids) for i in range(longest)] for row in rows])
    said_BT = torch.tensor(
        [[row.prompt <= i < len(row.ids) for i in range(1, longest)] for row in rows]
    )
    device = next(model.parameters()).device
    ids_BT, mask_BT, said_BT = (each.to(device) for each in (ids_BT, mask_BT, said_BT))
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits[:, :-1]
    picked_BT = logits_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1).float()
    logp_BT = picked_BT - logits_BTV.float().logsumexp(-1)
    return (logp_BT * said_BT).sum(-1)
