"""Documents -> pieces: tokens of a passage or a conversation, and which of them a model learns.

Letters: T tokens of a piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_tools.data.tables import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
"""The role whose turns are learned."""
GENERATION = re.compile(r"{%-?\s*generation\b")
"""Where a chat template marks itself what the assistant says."""


class Piece(NamedTuple):
    """Tokens that belong together."""

    ids_T: NDArray[np.int64]
    learned_T: NDArray[np.bool_] | None = None
    """Which of them count in the loss; None: all."""


class Encoder(Protocol):
    """Makes pieces of documents of one form."""

    def __call__(self, documents: Sequence[str]) -> list[Piece]:
        """One piece a document."""


def encoder(form: Form, tokenizer: PreTrainedTokenizerBase, begin: Sequence[int] = ()) -> Encoder:
    """What makes pieces of documents of a form; `begin` stands in front of prompts.

    Raises:
        ValueError: the tokenizer cannot: no token to end a text, no chat template, or one of the
            slow kind, which does not say where a token stands in the text.
    """
    match form:
        case "text":
            return OfText(tokenizer)
        case "turns":
            return OfTurns(tokenizer)
        case "pair":
            return OfPairs(tokenizer, begin)


class OfText:
    """A passage, followed by the token that ends a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.end = tokenizer, end_token(tokenizer)

    def __call__(self, documents: Sequence[str]) -> list[Piece]:
        """Every token is learned."""
        encoded = _ids(self.tokenizer, documents)
        return [Piece(np.array([*ids, self.end], dtype=np.int64)) for ids in encoded]


class OfPairs:
    """A prompt and its completion, and the token that ends a text; the completion is learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, begin: Sequence[int] = ()) -> None:
        self.tokenizer, self.end, self.begin = tokenizer, end_token(tokenizer), begin

    def __call__(self, documents: Sequence[str]) -> list[Piece]:
        """The two sides are tokenised apart: where one ends never hangs on what follows."""
        read = [json.loads(document) for document in documents]
        prompts = _ids(self.tokenizer, [one["prompt"] for one in read])
        completions = _ids(self.tokenizer, [one["completion"] for one in read])
        found = []
        for prompt, completion in zip(prompts, completions, strict=True):
            unlearned = len(self.begin) + len(prompt)
            ids_T = np.array([*self.begin, *prompt, *completion, self.end], dtype=np.int64)
            found.append(Piece(ids_T, np.arange(len(ids_T)) >= unlearned))
        return found


class OfTurns:
    """A conversation in the tokenizer's own chat template; what the assistant says is learned.

    The loss is on all that the template adds for a turn of the assistant behind the prompt for it:
    the words and the mark that ends the turn. It is found by rendering the conversation up to each
    such turn; a template that rewrites earlier turns says itself what is the assistant's, by
    `{% generation %}`, or is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks the tokenizer.

        Raises:
            ValueError: as `encoder`.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token is, and the "
                "loss on conversations needs it: use a fast tokenizer"
            )
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:  # none, or several of which none is the default
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template, and the data are "
                "conversations: use the tokenizer of an instruction-tuned model, set its "
                "chat_template, or give prompts and completions"
            ) from error
        self.tokenizer = tokenizer

    def __call__(self, documents: Sequence[str]) -> list[Piece]:
        """Templates write BOS themselves: nothing is added."""
        marked = GENERATION.search(self.template) is not None
        render = self._marked if marked else self._compared
        rendered = [render(json.loads(document)) for document in documents]
        encoded = self.tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        found = []
        for ids, offsets, (_, spans) in zip(
            encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True
        ):
            places_T2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            learned_T = np.zeros(len(ids), dtype=bool)
            for begin, end in spans:  # a token on the border is said by both, and not learned
                learned_T |= (places_T2[:, 0] >= begin) & (places_T2[:, 1] <= end)
            found.append(Piece(np.array(ids, dtype=np.int64), learned_T))
        return found

    def _marked(self, turns: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and what its template marks.

        Not by the mask of `apply_chat_template`, which is empty where a mark begins with a space.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        self._template(turns)  # what it says of a conversation that it cannot write
        options: dict[str, Any] = {"return_assistant_tokens_mask": True}
        options |= self.tokenizer.special_tokens_map
        found: Any = render_jinja_template([turns], chat_template=self.template, **options)
        (text,), (spans,) = found
        return text, spans

    def _compared(self, turns: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and what each turn of the assistant adds behind the prompt for it."""
        whole = self._template(turns)
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != ASSISTANT or not index:  # nothing asks for a first word
                continue
            before = self._template(turns[:index], add_generation_prompt=True)
            after = whole if index + 1 == len(turns) else self._template(turns[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path!r} writes the first "
                    f"{index + 1} of {len(turns)} turns in another way when more follow, so that "
                    "what the assistant says cannot be found: give conversations of one answer, "
                    "or a template that only appends"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _template(self, turns: list[dict[str, Any]], **options: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except Exception as error:  # templates raise whatever they like
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            roles = ", ".join(str(turn["role"]) for turn in turns[:6])
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} cannot write a conversation "
                f"of the roles {roles or 'of nobody'}: {reason[:200]} (mend the data, or set "
                "another chat_template)"
            ) from error
        assert isinstance(text, str)
        for name in _called(turns):
            if name not in text:
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path!r} does not write calls of "
                    f"tools, and a conversation calls {name!r}: leave such conversations out, or "
                    "set a template that does"
                )
        return text


def _called(turns: list[dict[str, Any]]) -> list[str]:
    """The names of the tools that are called."""
    calls = [call for turn in turns for call in turn.get("tool_calls") or []]
    return [str(call.get("function", call).get("name", "")) for call in calls]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: that a passage exceeds the model's context is nothing to warn about.
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return found


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text; nothing for many."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands between passages. Encoders have no EOS: SEP is what they know as an end.

    Raises:
        ValueError: the tokenizer has none of them.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        if isinstance(token, int):
            return token
    raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r} has no EOS, SEP or PAD token, and one must stand "
        "between documents: set tokenizer.eos_token"
    )
