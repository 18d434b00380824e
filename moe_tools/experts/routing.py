"""What a router decided, and how to watch it. Letters: T tokens, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from moe_tools.experts.division import Division
from moe_tools.hosts.ffn import FFN, GraftedFFN


class Routing(NamedTuple):
    """One decision of one FFN on one batch. Leading dimensions are the FFN input's."""

    ffn: str
    scores_TE: Tensor
    """A shared expert, which always runs, scores 1."""
    mask_TE: Tensor
    division: Division
    """The experts' sizes."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.mask_TE[..., 0].numel()

    @property
    def neurons_on(self) -> int:
        """Neurons that ran, summed over the tokens."""
        return self.division.count(self.mask_TE)


def routing_sparsity(routings: Sequence[Routing]) -> float:
    """Share of neurons off, over tokens and FFNs, each FFN weighed by the tokens it saw."""
    seen = sum(routing.tokens * routing.division.neurons for routing in routings)
    return 1 - sum(routing.neurons_on for routing in routings) / seen


class RoutedFFN(GraftedFFN):
    """An FFN that routes and can be watched. `ExpertFFN` is the one there is."""

    done = "routed"

    def __init__(self, ffn: FFN) -> None:
        super().__init__(ffn)
        self.observers: list[Callable[[Routing], None]] = []
        """Each is shown every decision."""


def routed_ffns(model: nn.Module) -> list[RoutedFFN]:
    """The routed FFNs of a model, in the host's order; empty when it is dense."""
    return [module for module in model.modules() if isinstance(module, RoutedFFN)]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Yields a list that grows by one `Routing` an FFN a forward pass, in forward order.

    Recording changes no output and leaves nothing behind. Tensors keep their graph, so that
    losses on scores can be built from them.

    Raises:
        ValueError: the model has no routed FFN.
    """
    records: list[Routing] = []
    with observe_routing(model, records.append):
        yield records


@contextmanager
def observe_routing(model: nn.Module, observe: Callable[[Routing], None]) -> Iterator[None]:
    """While it lasts, `observe` is shown every decision of every FFN; what it keeps is its own.

    Raises:
        ValueError: the model has no routed FFN.
    """
    routed = routed_ffns(model)
    if not routed:
        raise ValueError(f"{type(model).__name__} has no routed FFN to record: convert it first")
    for ffn in routed:
        ffn.observers.append(observe)
    try:
        yield
    finally:
        for ffn in routed:
            ffn.observers.remove(observe)
