"""Where FFNs have dropout, by trial: a probability of 1 leaves zeros.

A probability is a float, of the holder itself (`F.dropout(h, p=self.activation_dropout)`) or of a
module below it (`nn.Dropout.p`). One is tried at a time, in all FFNs that have it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.hosts.finder.tracing import Hook, Inputs, hooked
from moe_tools.hosts.layouts import Layout, join

ALL = 1.0
HALF = 0.5
"""Tells a dropout of y from y = 0, which every dropout of h by 1 makes of a down without bias."""
DROPPED = 0.3
"""More zeros than another dropout leaves, at the usual 0.1."""


def with_dropouts(model: nn.Module, inputs: Inputs, rows: dict[str, Layout]) -> dict[str, Layout]:
    """The rows with their dropouts: of h, and of y where the holder is whole.

    A masked FFN keeps the host's own. Two probabilities that are one module are both found.
    """
    ours = {holder: layout for holder, layout in rows.items() if not layout.masked}
    found = dict(rows)
    tried: dict[tuple[str, str], list[str]] = {}
    for holder in ours:
        for place in _places(model.get_submodule(holder)):
            tried.setdefault(place, []).append(holder)
    for place, holders in tried.items():
        chosen = {holder: ours[holder] for holder in holders}
        name = place[0] or place[1]
        for holder in _dropped(model, inputs, chosen, place, ALL, of_output=False):
            found[holder] = replace(found[holder], hidden_dropout=name)
        whole = {holder: layout for holder, layout in chosen.items() if not layout.slot}
        for holder in _dropped(model, inputs, whole, place, HALF, of_output=True):
            found[holder] = replace(found[holder], output_dropout=name)
    return found


def _dropped(
    model: nn.Module,
    inputs: Inputs,
    rows: dict[str, Layout],
    place: tuple[str, str],
    probability: float,
    *,
    of_output: bool,
) -> list[str]:
    """The holders where a number makes zeros in h, or in y, and only in train mode."""
    least = DROPPED if of_output else ALL
    left = rows
    for training in (True, False):
        if left:
            shares = _zero_shares(model, inputs, left, place, (probability, training), of_output)
            zeros = {holder for holder, share in shares.items() if share >= least}
            left = {holder: row for holder, row in left.items() if (holder in zeros) is training}
    return list(left)


def _places(holder: nn.Module) -> list[tuple[str, str]]:
    """(path of a module below or of the holder itself, name of a float) of what may be one."""
    return [
        (path, name)
        for path, module in holder.named_modules()
        if not path or not (list(module.children()) or list(module.parameters()))
        for name, value in vars(module).items()
        if isinstance(value, float) and 0 <= value <= 1
    ]


@torch.no_grad()
def _zero_shares(
    model: nn.Module,
    inputs: Inputs,
    rows: dict[str, Layout],
    place: tuple[str, str],
    state: tuple[float, bool],
    of_output: bool,
) -> dict[str, float]:
    """Holder -> share of zeros in h, or in y, with a number in a place, in train mode or not."""
    path, name = place
    shares: dict[str, float] = {}
    watched = []
    for holder, layout in rows.items():
        module = holder if of_output else join(holder, layout.down)
        watched.append((model.get_submodule(module), _watcher(holder, shares, of_output)))
    changed = [model.get_submodule(join(holder, path)) for holder in rows]
    with torch.random.fork_rng(devices=[]), _changed(changed, name, *state), hooked(watched):
        torch.manual_seed(0)
        try:
            model(**inputs)
        except Exception:  # a float that was no probability: 1 is too much for it
            return {}
    return shares


def _watcher(holder: str, shares: dict[str, float], of_output: bool) -> Hook:
    def watch(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen = out if of_output else args[0]
        if isinstance(seen, Tensor):
            shares[holder] = float((seen == 0).float().mean())

    return watch


@contextmanager
def _changed(modules: list[nn.Module], name: str, value: float, training: bool) -> Iterator[None]:
    """These modules alone with another number and mode, not those below."""
    before = [(module, getattr(module, name)) for module in modules]
    try:
        for module in modules:
            module.training = training
            setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            module.training = False
            setattr(module, name, old)
