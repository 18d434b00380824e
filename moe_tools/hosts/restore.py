"""Takes back what `graft` did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from moe_tools.hosts.ffn import FFN


@contextmanager
def restored(model: nn.Module, ffns: Sequence[FFN]) -> Iterator[None]:
    """Puts the host's own modules back at the end, wherever a module was grafted meanwhile."""
    with ExitStack() as stack:
        for ffn in ffns:
            for name in (ffn.name, *ffn.also):
                stack.callback(model.set_submodule, name, model.get_submodule(name))
            for path in ffn.layout.bypass:
                parent, _, name = path.rpartition(".")
                owner = ffn.layer.get_submodule(parent)
                stack.callback(setattr, owner, name, getattr(owner, name))
        yield
