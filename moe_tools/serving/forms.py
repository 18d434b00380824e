"""What a request may say, and how its answers look: OpenAI's two ways to have a text continued.

A field that would be without effect here is refused unless it says what happens anyway: an answer
that ignores what it was asked for looks right and is not.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_tools.registry import short
from moe_tools.serving.refusal import Refusal
from moe_tools.serving.sampling import Sampling

Text = Annotated[str, Field(max_length=1 << 24)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields that ask for nothing that shows in an answer."""


Tokens = Annotated[list[int], Field(fail_fast=True)]
"""One mistake is enough: a list of four million would be as many."""


Several = Annotated[list[Tokens], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Wanted(_Strict):
    """What both kinds of requests may say. The bounds are OpenAI's."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def sampling(self, usual: Sampling) -> Sampling:
        """How to choose tokens; what is not said is as usual for the model."""
        names = ("temperature", "top_p", "top_k", "seed")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(usual, **said)

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most(self) -> int | None:
        """Tokens of the answer, if that is said."""
        return self.max_tokens


class Completion(Wanted):
    """`POST /v1/completions`."""

    prompt: Text | Tokens | Annotated[list[Text], Field(max_length=1)] | Several
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    suffix: Literal[""] | None = None

    @property
    def text(self) -> str | list[int]:
        """The prompt, as text or as tokens.

        Raises:
            Refusal: not exactly one.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and isinstance(self.prompt[0], int):
            return self.prompt
        if len(self.prompt) != 1:
            raise Refusal(
                400,
                f"prompt holds {len(self.prompt)} texts: send one in each request",
                param="prompt",
            )
        return self.prompt[0]  # type: ignore[return-value]


class Part(_Strict):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn; what else it holds is the template's."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None


class Plain(_Strict):
    """`response_format`: free text is the only one."""

    type: Literal["text"]


class Chat(Wanted):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: Plain | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[dict[str, Any]]:
        """The messages as templates read them: content as one text."""
        return [_plain(message) for message in self.messages]


def _plain(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    extra = message.model_extra or {}
    return {**extra, "role": message.role, "content": content or ""}


W = TypeVar("W", bound=Wanted)


def read(kind: type[W], body: bytes) -> W:
    """Reads a request.

    Raises:
        Refusal: no JSON, or a field that is wrong.
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise Refusal(400, f"the body is {type(said).__name__}, and must be a JSON object")
    for name in IGNORED:
        said.pop(name, None)
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        raise _refusal(said, error) from error


def _refusal(said: dict[str, Any], error: ValidationError) -> Refusal:
    """The first mistake."""
    found = error.errors(include_url=False, include_context=False)[0]
    field = str(found["loc"][0]) if found["loc"] else None
    if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
        known = short(field, 60)
        return Refusal(400, f"unknown field {known}: leave it out", param=field)
    if found["type"] == "missing" and len(found["loc"]) == 1:
        return Refusal(400, f"{field} is missing", param=field)
    value = short(said.get(field or ""), 60)
    return Refusal(400, f"{field} is {value}: {found['msg']}", param=field)


class Answer(ABC):
    """The JSON of an answer, and of the parts of one that is streamed."""

    kind: ClassVar[str]
    whole_object: ClassVar[str]
    part_object: ClassVar[str]
    has_first: ClassVar[bool]
    """Whether a piece without text comes first."""
    usual: ClassVar[int | None]
    """Tokens where a request says nothing; None: what the context has left, or `LONG`."""

    def __init__(self, name: str, model: str) -> None:
        self._head = {"id": name, "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """All at once."""
        choice = {"index": 0, **self._all(text), "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self.whole_object, "choices": [choice], **usage}

    def part(self, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """A piece; None: what is sent before the first, or behind the last."""
        choice = {"index": 0, **self._piece(text, reason), "logprobs": None}
        choices = [{**choice, "finish_reason": reason}]
        return {**self._head, "object": self.part_object, "choices": choices}

    def figures(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What is sent behind the last piece, where `stream_options` ask for it."""
        return {**self._head, "object": self.part_object, "choices": [], **usage}

    @abstractmethod
    def _all(self, text: str) -> dict[str, Any]:
        """How a choice holds its text."""

    @abstractmethod
    def _piece(self, text: str | None, reason: str | None) -> dict[str, Any]:
        """How a choice holds a piece of it."""


class CompletionAnswer(Answer):
    """Of a completion."""

    kind, usual = "completions", 16
    whole_object = part_object = "text_completion"
    has_first = False

    def _all(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str | None, reason: str | None) -> dict[str, Any]:
        return {"text": text or ""}


class ChatAnswer(Answer):
    """Of a chat."""

    kind, usual = "chat", None
    whole_object, part_object = "chat.completion", "chat.completion.chunk"
    has_first = True

    def _all(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str | None, reason: str | None) -> dict[str, Any]:
        if text is None:
            return {"delta": {} if reason else {"role": "assistant", "content": ""}}
        return {"delta": {"content": text}}
