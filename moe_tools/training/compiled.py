"""A train step under torch.compile: the forward pass of the model, and the backward pass with it.

Losses are compiled along where they look inside the FFNs (`watch_ffns`, `record_routing`): hooks
are part of the graph. The losses on logits, the optimizer and every evaluation stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def compiled(model: nn.Module, on: bool = True) -> Iterator[None]:
    """While it lasts, calls of the model are compiled, in place: its class and names stay."""
    if not on:
        yield
        return
    model.compile()
    try:
        yield
    finally:
        model._compiled_call_impl = None


@contextmanager
def eager() -> Iterator[None]:
    """While it lasts, nothing is compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield
