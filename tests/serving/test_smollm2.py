"""A real model behind the server: what it says to eight clients at once, and how it ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.cli.demo import donor_file
from tests.served import running

PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "In the beginning of the twentieth century, the people of the city were",
    "One, two, three, four,",
    "Water boils at",
    "Why do birds sing? Because",
    "A unit test is a small program that",
]
NEW = 24


@pytest.mark.slow
def test_smollm2_says_to_eight_at_once_what_it_says_to_each(tmp_path: Path) -> None:
    source = str(donor_file())
    model, tokenizer = load(source, dtype=torch.float32), load_tokenizer(source)
    save(model, tmp_path / "smollm2", tokenizer)
    expected = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**given, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
        new = said[0, given["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    with running(tmp_path / "smollm2") as server, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: server.completion(prompt, NEW), PROMPTS))
        chat = server.openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Say hi."}], max_tokens=8
        )
    equal = [one == other for one, other in zip(found, expected, strict=True)]
    assert sum(equal) >= 7, (found, expected)  # sums in another order part two near ties
    assert chat.choices[0].message.content
