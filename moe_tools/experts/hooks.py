"""Registers hooks for a while, and asks who hears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.modules import module
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks of these handles at the end, whatever happens.

    `handles` may be a generator that registers them one by one.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def all_are_heard() -> bool:
    """Whether somebody hooks every module, so that none may be computed in another's place."""
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
