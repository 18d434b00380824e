"""Drops small numbers of what enters linears: TEAL, arXiv 2408.14690, and LaRoSA, arXiv 2507.01299.

The linears stay the host's own: a hook changes what they are given. Linears that are given the same
numbers share one threshold, which is a child of the first of them, as it has tensors to save.

Letters: T tokens, any leading dimensions, D numbers of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

CHILD = "threshold"
"""What it is called below its linear."""
POINTS = 101
"""Quantiles that are kept, from the 0th to the 100th percentile."""
MOST = 0.99
"""The largest share that is dropped: beyond, the quantiles say nothing."""


class InputThreshold(nn.Module):
    """Drops every number of x that is no further from 0 than `at`; perhaps of a rotated x."""

    def __init__(self, site: str, rotated: int | None, device: torch.device) -> None:
        """`rotated` is D, where x is turned before numbers are dropped, and back after it."""
        super().__init__()
        self.site = site
        """What it is called in the config's block."""
        self.reads = 0
        """Matrix weights that one number of x reads."""
        self.at = 0.0
        """0 drops nothing."""
        self.on = True
        """False hands x on."""
        self.observers: list[Callable[[Tensor], None]] = []
        """Each is shown x, rotated, before anything is dropped."""
        self.quantiles: Tensor
        """Of the magnitudes on calibration text: other shares need no text."""
        self.register_buffer("quantiles", torch.zeros(POINTS, device=device))
        self.rotation: Tensor | None
        """Columns are the directions along which numbers are dropped; None: those of x."""
        turn_DD = None if rotated is None else torch.eye(rotated, device=device)
        self.register_buffer("rotation", turn_DD)

    def forward(self, x_TD: Tensor, *, shown: bool = True) -> Tensor:
        """x_TD without its small numbers; `shown` to the observers, if another linear did not."""
        if not self.on:
            return x_TD
        if self.rotation is None:
            return self._drop(x_TD, shown)
        turn_DD = self.rotation
        return (self._drop(x_TD.to(turn_DD.dtype) @ turn_DD, shown) @ turn_DD.T).to(x_TD.dtype)

    def _drop(self, x_TD: Tensor, shown: bool) -> Tensor:
        for observe in self.observers if shown else ():
            observe(x_TD)
        return x_TD.masked_fill(x_TD.abs() <= self.at, 0) if self.at > 0 else x_TD

    def magnitude(self, share: float) -> float:
        """Below which magnitude so large a share of the numbers is, by the quantiles."""
        if share <= 0:
            return 0.0
        place = min(share, MOST) * (POINTS - 1)
        low, part = int(place), place % 1
        first, second = self.quantiles[low : low + 2].tolist()
        return float(first + part * (second - first))


class Drop:
    """The hook that lets a linear see what its threshold leaves; copied and pickled with it."""

    def __init__(self, threshold: InputThreshold, *, first: bool) -> None:
        self.threshold = threshold
        self.first = first
        """Its linear is the first of those that are given the same numbers."""

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments of the linear."""
        return (self.threshold(args[0], shown=self.first), *args[1:])


def put_threshold(calls: Sequence[Sequence[nn.Module]], threshold: InputThreshold) -> None:
    """Lets linears share a threshold, in place: those of one call are given the same x."""
    calls[0][0].add_module(CHILD, threshold)
    for linears in calls:
        for linear in linears:
            linear.register_forward_pre_hook(Drop(threshold, first=linear is linears[0]))


def remove_thresholds(model: nn.Module, thresholds: Collection[InputThreshold]) -> None:
    """Takes some thresholds out of a model, in place."""
    for module in list(model.modules()):
        for key, hook in list(_drops(module)):
            if hook.threshold in thresholds:
                del module._forward_pre_hooks[key]
        if module._modules.get(CHILD) in thresholds:
            del module._modules[CHILD]


def threshold_of(linear: nn.Module) -> InputThreshold | None:
    """What drops numbers that enter a linear; None: nothing does."""
    return next((hook.threshold for _, hook in _drops(linear)), None)


def move_threshold(old: nn.Module, new: nn.Module) -> None:
    """Lets another module see what the threshold of `old` leaves, in its place: an adapter."""
    for key, hook in list(_drops(old)):
        del old._forward_pre_hooks[key]
        new.register_forward_pre_hook(hook)


def _drops(linear: nn.Module) -> Iterator[tuple[int, Drop]]:
    hooks = linear._forward_pre_hooks.items()
    return ((key, hook) for key, hook in hooks if isinstance(hook, Drop))


def thresholds_in(model: nn.Module) -> dict[str, InputThreshold]:
    """Path -> every threshold of a model, each once."""
    found = model.named_modules()
    return {path: module for path, module in found if isinstance(module, InputThreshold)}


@contextmanager
def nothing_dropped(model: nn.Module) -> Iterator[None]:
    """While it lasts, every linear is given what its host gives it."""
    found = {hook.threshold for module in model.modules() for _, hook in _drops(module)}
    with _switched(found, on=False):
        yield


@contextmanager
def switched_on(thresholds: Collection[InputThreshold]) -> Iterator[None]:
    """While it lasts, these drop what they are to drop."""
    with _switched(thresholds, on=True):
        yield


@contextmanager
def _switched(thresholds: Collection[InputThreshold], *, on: bool) -> Iterator[None]:
    before = [(threshold, threshold.on) for threshold in thresholds]
    for threshold in thresholds:
        threshold.on = on
    try:
        yield
    finally:
        for threshold, was in before:
            threshold.on = was
