"""A token is chosen by the settings and the seed of its own request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from moe_tools.serving.sampling import Chooser, Sampling, unread

SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])


def drawn(sampling: Sampling, times: int = 400) -> set[int]:
    chooser = Chooser(sampling, torch.device("cpu"))
    return {int(chooser.narrow(SCORES).argmax()) for _ in range(times)}


def test_without_temperature_the_scores_stay() -> None:
    assert Chooser(Sampling(), torch.device("cpu")).narrow(SCORES) is SCORES


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.65}, {0, 1}),  # 0.64 and 0.24
        ({"top_k": 3, "top_p": 0.95}, {0, 1, 2}),
    ],
)
def test_only_the_likeliest_are_drawn(settings: dict[str, float], expected: set[int]) -> None:
    assert drawn(Sampling(temperature=1.0, seed=0, **settings)) == expected  # type: ignore[arg-type]


def test_a_low_temperature_is_nearly_greedy() -> None:
    assert drawn(Sampling(temperature=0.01)) == {0}


def test_tokens_come_as_often_as_they_should() -> None:
    chooser = Chooser(Sampling(temperature=2.0, seed=3), torch.device("cpu"))
    picked = torch.stack([chooser.narrow(SCORES).argmax() for _ in range(4000)])
    found = picked.bincount(minlength=5) / 4000
    torch.testing.assert_close(found, (SCORES / 2).softmax(-1), atol=0.03, rtol=0)


def test_half_precision_is_drawn_too() -> None:
    chooser = Chooser(Sampling(temperature=1.0, top_p=0.9), torch.device("cpu"))
    assert int(chooser.narrow(SCORES.bfloat16()).argmax()) in (0, 1, 2)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"do_sample": False, "temperature": 0.6}, Sampling()),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, Sampling(0.6, 1.0, 20)),
        ({"do_sample": True, "temperature": None, "top_p": "x"}, Sampling(1.0)),
        ({}, Sampling()),
    ],
)
def test_a_model_says_what_is_usual(said: dict[str, object], expected: Sampling) -> None:
    assert Sampling.of_model(SimpleNamespace(**said)) == expected


def test_what_is_not_read_is_named() -> None:
    settings = GenerationConfig(do_sample=True, min_p=0.1, typical_p=1.0, temperature=0.5)
    assert unread(settings) == ["min_p"]
    assert unread(GenerationConfig(min_p=0.1)) == []
