"""Holds a config's sizes against the files: a line of text may ask for all of the memory.

transformers makes room for what `config.json` says before it looks at the weights. Here the model
is watched while it is built, without numbers: one with more tensors than its files can hold is
refused before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident, local
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from moe_tools.checkpoint.broken import BrokenFolder

MOST_OF = {re.compile(r"layers?$"): 2_000, re.compile(r"(experts|labels)$"): 100_000}
"""Ends of keys of a config that lists are made from, an entry each, before any tensor is -> more
than any model has."""
MODULES = 100_000
"""More than any model has; experts that are fused are one."""
PER_BYTE = 2
"""Numbers that a byte of plain weights stands for, at most: fp8, and tied matrices once more."""
QUANTISED = 8
"""The same where a quantiser wrote them, in bits."""
SPARE = 1 << 24
"""Numbers that may be missing in a folder, whose loading then says which."""


def check_counts(config: Mapping[str, Any], where: str) -> None:
    """Checks a config, as plain data, before a model's configuration is made from it.

    Raises:
        BrokenFolder: more layers, experts or labels than any model has.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, where)
        for end, most in MOST_OF.items():
            if isinstance(value, int) and value > most and end.search(str(key)):
                raise BrokenFolder(f"{where}: {key} is over {most:,}, which no model has")


def room(files: Iterator[Path] | set[Path], *, quantised: bool) -> int:
    """The most numbers that a model of these weight files has."""
    stored = sum(file.stat().st_size for file in files)
    return SPARE + stored * (QUANTISED if quantised else PER_BYTE)


@contextmanager
def sized(source: str, most: int | None = None) -> Iterator[None]:
    """While it lasts, this thread builds no model of more modules than any, or more numbers.

    Args:
        source: what the error names.
        most: numbers in tensors, see `room`; None: as many as it likes, on the meta device.

    Raises:
        BrokenFolder: as soon as there are more.
    """
    thread, modules, numbers = get_ident(), 0, 0
    counted: dict[tuple[int, str], int] = {}

    def count_module(*_: Any) -> None:
        nonlocal modules
        modules += get_ident() == thread
        if modules > MODULES:
            raise BrokenFolder(
                f"{source}: its config describes a model of over {MODULES:,} modules"
            )

    def count_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers
        if tensor is None or most is None or get_ident() != thread or _apart.is_on:
            return
        key = id(module), name  # the same place again, once it is filled
        numbers += tensor.numel() - counted.get(key, 0)
        counted[key] = tensor.numel()
        if numbers > most:
            raise BrokenFolder(
                f"{source}: its config describes a model of more than {most:.2g} numbers, "
                f"which its weight files cannot hold ({name} is {tuple(tensor.shape)})"
            )

    hooks = (
        registration.register_module_module_registration_hook(count_module),
        registration.register_module_parameter_registration_hook(count_tensor),
        registration.register_module_buffer_registration_hook(count_tensor),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Apart(local):
    """Whether this thread builds models that are no part of what is loaded."""

    is_on = False


_apart = _Apart()


@contextmanager
def apart() -> Iterator[None]:
    """While it lasts, `sized` counts no numbers in this thread.

    For models of a config that was counted once and are looked at only, on the meta device: a swap
    is said by what another activation's name changes (`hosts.activation_keys`), and two more of a
    Mixtral would be more than its files hold.
    """
    before, _apart.is_on = _apart.is_on, True
    try:
        yield
    finally:
        _apart.is_on = before
