"""A train step under torch.compile: the forward pass of the model, and the backward pass with it.

Losses are compiled along where they look inside the FFNs (`watch_ffns`, `record_routing`): hooks
are part of the graph. The losses on logits, the optimizer and every evaluation stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moe_tools.hosts.moe_host import HostExperts
from moe_tools.steps.launch import Launch


def check_compiles(model: nn.Module, launch: Launch) -> None:
    """Whether a model can be compiled as a launch says.

    Raises:
        ValueError: an MoE host whose experts are modules of their own: how many tokens each has is
            known only when it runs, so that every expert would be a graph for itself.
    """
    if not launch.compile:
        return
    for name, module in model.named_modules():
        if isinstance(module, HostExperts):
            raise ValueError(
                f"--compile does not pay where experts are taken apart, as {name} is: each would "
                "be compiled for itself, for minutes: leave it out"
            )


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
