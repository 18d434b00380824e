"""The application: paths, and from a request's bytes to an order.

Why not transformers' own server (`transformers serve`): it loads whatever model a request names,
samples every request of a batch by the settings of the first, goes on with answers whose client has
left, and answers mistakes in shapes of its own. Its engine is what serves here.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moe_tools.serving.engine import Engine
from moe_tools.serving.forms import Chat, ChatAnswer, Completion, CompletionAnswer, Wanted, read
from moe_tools.serving.hosted import Hosted
from moe_tools.serving.limits import Body, Key, Turns
from moe_tools.serving.metrics import Metrics
from moe_tools.serving.order import Order
from moe_tools.serving.refusal import Refusal, refused
from moe_tools.serving.reply import Kitchen, Reply
from moe_tools.serving.sparsity import Watch
from moe_tools.serving.text import Writer

_log = logging.getLogger(__name__)

LONG = 1024
"""Tokens of an answer in a chat that says no other number, if the context has as many left."""
BODY_SECONDS = 30.0
"""A body that is not here by then does not come."""
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    waiting: int = 64
    """Requests that wait while others run."""
    body: int = 4 << 20
    """Bytes of a request."""
    key: str | None = field(default=None, repr=False)


class Service:
    """The paths of a server."""

    def __init__(self, hosted: Hosted, engine: Engine, watch: Watch, limits: Limits) -> None:
        self._hosted, self._engine, self._limits = hosted, engine, limits
        turns = Turns(engine.slots, limits.waiting)
        self._metrics = Metrics(watch, turns)
        self._kitchen = Kitchen(engine, turns, self._metrics, watch)
        self._encoding = asyncio.Lock()
        """Tokenizers take one text at a time."""

    def app(self) -> Starlette:
        """The application of ASGI."""
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/metrics", self.metrics),
                Route("/health", self.health),
            ],
            middleware=[
                Middleware(Key, key=self._limits.key),
                Middleware(Body, most=self._limits.body),
            ],
            exception_handlers={
                Refusal: self.refused,
                HTTPException: self.no_path,
                ClientDisconnect: self.gone,
                Exception: self.failed,
            },
        )

    async def completions(self, request: Request) -> Response:
        """Continues a text."""
        wanted = read(Completion, await _body(request))
        self._hosted.check_name(wanted.model)
        async with self._encoding:
            prompt = await run_in_threadpool(self._hosted.encode, wanted.text)
        name = f"cmpl-{uuid.uuid4().hex}"
        return self._reply(wanted, prompt, name, CompletionAnswer(name, self._hosted.name))

    async def chat(self, request: Request) -> Response:
        """Continues a talk."""
        wanted = read(Chat, await _body(request))
        self._hosted.check_name(wanted.model)
        extra = wanted.chat_template_kwargs or {}
        async with self._encoding:
            prompt = await run_in_threadpool(self._hosted.encode_chat, wanted.turns(), extra)
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return self._reply(wanted, prompt, name, ChatAnswer(name, self._hosted.name))

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same, by its name."""
        self._hosted.check_name(request.path_params["name"])
        return JSONResponse(self._model())

    async def metrics(self, _: Request) -> Response:
        """What was counted."""
        return Response(self._metrics.page(), media_type=PROMETHEUS)

    async def health(self, _: Request) -> Response:
        """Whether it computes."""
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def refused(self, request: Request, error: Exception) -> Response:
        """A request that cannot be answered."""
        assert isinstance(error, Refusal)
        return await refused(request, error)

    async def no_path(self, request: Request, error: Exception) -> Response:
        """No such path, or not with this method."""
        assert isinstance(error, HTTPException)
        said = f"{request.method} {request.url.path}: {error.detail}"
        return Refusal(error.status_code, said).response()

    async def gone(self, _: Request, __: Exception) -> Response:
        """The client left while it sent its body."""
        return Response(status_code=400)

    async def failed(self, _: Request, error: Exception) -> Response:
        """A mistake of ours: the log has it, the client need not."""
        return Refusal(500, "the server failed; its log says why").response()

    def _reply(self, wanted: Wanted, prompt: list[int], name: str, answer: Any) -> Response:
        if not self._engine.alive:
            raise Refusal(503, "the model does not run any more; see the server's log")
        new = self._new(wanted, len(prompt), answer.usual)
        hosted = self._hosted
        order = Order(name, prompt, new, hosted.ends, wanted.sampling(hosted.sampling))
        figures = wanted.stream_options is not None and wanted.stream_options.include_usage
        writer = Writer(hosted.tokenizer, wanted.stops)
        return Reply(self._kitchen, order, writer, answer, bool(wanted.stream), figures)

    def _new(self, wanted: Wanted, prompt: int, usual: int | None) -> int:
        """Tokens of the answer.

        Raises:
            Refusal: they and the prompt exceed the context.
        """
        most = _least(self._hosted.context, self._engine.room)
        left = LONG if most is None else most - prompt
        new = wanted.most or min(usual or LONG, max(left, 1))
        if most is not None and prompt + new > most:
            raise Refusal(
                400,
                f"a prompt of {prompt} tokens and {new} new ones exceed the {self._what(most)} of "
                f"{most} tokens: shorten the prompt or max_tokens",
                param="messages" if isinstance(wanted, Chat) else "prompt",
                code="context_length_exceeded",
            )
        return new

    def _what(self, most: int) -> str:
        return "context" if most == self._hosted.context else "KV cache"

    def _model(self) -> dict[str, Any]:
        most = _least(self._hosted.context, self._engine.room)
        return {
            "id": self._hosted.name,
            "object": "model",
            "created": 0,
            "owned_by": "moe-tools",
            "max_model_len": most,
        }


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


async def _body(request: Request) -> bytes:
    """All of it.

    Raises:
        Refusal: it does not come.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {BODY_SECONDS:.0f} s") from error
