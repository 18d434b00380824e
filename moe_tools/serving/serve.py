"""Serves one model on transformers: loads it, chooses how to compute requests, and runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.inference.prompt_ffn import prompt_ffns
from moe_tools.serving.app import Limits, Service
from moe_tools.serving.batched import Batched, CannotBatch, prove
from moe_tools.serving.engine import Engine
from moe_tools.serving.hosted import Packing, host
from moe_tools.serving.one_by_one import OneByOne
from moe_tools.serving.server import Server, bind, ended_by_signals
from moe_tools.serving.sparsity import Watch

_log = logging.getLogger(__name__)

Batching = Literal["auto", "on", "off"]
SPARE = 64
"""Connections beyond those that run and wait: of /health, /metrics and clients that are idle."""


@dataclass(frozen=True)
class Settings:
    """What to serve, and how."""

    source: str
    dtype: torch.dtype
    device: str = "cpu"
    name: str | None = None
    packing: Packing | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    slots: int = 8
    """Requests at once."""
    batching: Batching = "auto"
    every: int | None = None
    """One pass in so many is looked at for sparsity; 0: none. None: `Watch`'s own."""
    grace: float = 30.0
    """Seconds for requests that run when the server is asked to end."""
    limits: Limits = field(default_factory=Limits)


def serve(settings: Settings) -> None:
    """Serves until a signal ends it.

    Raises:
        ValueError: an address that cannot be taken, a model that cannot be served, or one that has
            to be batched and cannot.
    """
    with quiet_transformers(), opened(settings) as server, ended_by_signals(server):
        server.start()
        _log.info("%s/v1", server.address)
        server.join()


@contextmanager
def opened(settings: Settings) -> Iterator[Server]:
    """A server that has not begun; its model and its address are free again at the end.

    Raises:
        ValueError: as `serve`.
    """
    with closing(bind(settings.host, settings.port)) as held:
        hosted = host(
            settings.source,
            name=settings.name,
            dtype=settings.dtype,
            device=settings.device,
            packing=settings.packing,
        )
        watch = Watch(hosted.model, settings.every)
        engine = choose(hosted.model, watch, settings.batching, settings.slots)
        try:
            limits = settings.limits
            connections = engine.slots + limits.waiting + SPARE
            service = Service(hosted, engine, watch, limits)
            yield Server(service.app, held, connections=connections, grace=settings.grace)
        finally:
            engine.stop()


def choose(model: PreTrainedModel, watch: Watch, batching: Batching, slots: int) -> Engine:
    """What computes the requests; one line of the log says it.

    Raises:
        ValueError: `on`, and the model cannot be batched.
    """
    why = "as asked for"
    if batching != "off":
        try:
            if prompt_ffns(model):
                raise CannotBatch("it selects its neurons by the prompt, of one text at a time")
            if slots == 1 and batching == "auto":
                raise CannotBatch("one request runs at once")
            prove(model)
            engine = Batched(model, watch, slots)
            _log.info("up to %d requests at once", slots)
            return engine
        except CannotBatch as error:
            if batching == "on":
                raise ValueError(f"requests cannot run at once: {error}") from error
            why = str(error)
    _log.info("requests run one at a time: %s", why)
    return OneByOne(model, watch)
