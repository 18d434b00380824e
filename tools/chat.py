"""Makes a file of conversations out of the embedded documentation, to try SFT without a network.

    python tools/chat.py chat.jsonl [COUNT]

A question quotes how a docstring begins, the answer is its next paragraphs; a long one goes on in
further turns. The same `docs` give the same file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_tools.data import texts

MOST_TURNS = 3
"""Answers of one conversation."""
ANSWER = 1200
"""Characters of an answer, at most: about 300 tokens."""


def main(arguments: list[str]) -> None:
    """Writes the file."""
    count = int(arguments[1]) if len(arguments) > 1 else 2000
    found = filter(None, map(conversation, both_splits()))
    with Path(arguments[0]).open("w", encoding="utf-8") as file:
        for _, turns in zip(range(count), found, strict=False):
            file.write(json.dumps({"messages": turns}) + "\n")


def both_splits() -> Iterator[str]:
    """All documents; who reads the file holds out some of the conversations."""
    yield from texts("docs", split="heldout")
    yield from texts("docs", split="train")


def conversation(text: str) -> list[dict[str, str]] | None:
    """The turns of a document; None: it is too short for an answer."""
    first, *rest = [part.strip() for part in text.split("\n\n") if part.strip()]
    answers = [part[:ANSWER] for part in rest if len(part) > 80][:MOST_TURNS]
    if not answers or len(first) > ANSWER:
        return None
    asked = [f"What does the documentation say that begins with this line?\n{first}"]
    asked += ["What does it say next?"] * (len(answers) - 1)
    pairs = zip(asked, answers, strict=True)
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
