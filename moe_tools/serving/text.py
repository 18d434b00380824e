"""Tokens become text while they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

PART = "\ufffd"
"""What a part of a character decodes to."""
MOST_PARTS = 16
"""Tokens that may be parts of one character; more are broken text, or none."""


class Writer:
    """The text of one answer.

    Text is held back while it may be part of a character, or of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        """The last that were said, before which others decode as they do in the whole text, and
        those that were not said yet."""
        self._said = 0
        """How many of them were said."""
        self._held = ""
        self.stopped = False
        """Whether a stop string was met: nothing comes behind it."""

    def add(self, token: int) -> str:
        """What can be said now."""
        self._tokens.append(token)
        text = self._new()
        if len(self._tokens) - self._said < MOST_PARTS and (not text or text.endswith(PART)):
            return ""
        self._keep()
        return self._cut(text)

    def rest(self) -> str:
        """What is left behind the last token."""
        if self.stopped:
            return ""
        return self._cut(self._new()) + ("" if self.stopped else self._let_go())

    def _new(self) -> str:
        """The text of the tokens that were not said."""
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._said])) :]

    def _keep(self) -> None:
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _cut(self, text: str) -> str:
        """What of the text held back and this one is certain to be said."""
        text = self._held + text
        met = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if met:
            self.stopped, self._held = True, ""
            return text[: min(met)]
        begun = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def _let_go(self) -> str:
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
