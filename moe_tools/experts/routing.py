"""Records what routers decide.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from moe_tools.experts.division import Division
from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, GraftedFFN


class Routing(NamedTuple):
    """One decision of one FFN on one batch. Leading dimensions are the FFN input's.

    Scores and masks have every row, padding included, so that they line up with other tensors of
    the model; whatever is counted leaves padding out.
    """

    ffn: str
    scores_TE: Tensor
    """A shared expert, which always runs, scores 1."""
    mask_TE: Tensor
    division: Division
    """Sizes of the experts."""
    valid_T: Tensor | None = None
    """Which rows are tokens, by the attention mask of the pass; None: all of them."""

    @property
    def tokens(self) -> int:
        """How many tokens the FFN saw, without padding."""
        return len(self.of_tokens(self.mask_TE))

    @property
    def neurons_on(self) -> int:
        """Neurons that ran, summed over the tokens."""
        return self.division.count(self.of_tokens(self.mask_TE))

    def of_tokens(self, values_T: Tensor) -> Tensor:
        """Rows of `values_T` without padding, as one dimension.

        Args:
            values_T: has the leading dimensions of the mask.
        """
        if self.valid_T is not None:
            return values_T[self.valid_T]
        return values_T.reshape(-1, *values_T.shape[self.mask_TE.ndim - 1 :])


def routing_sparsity(routings: Sequence[Routing]) -> float:
    """Share of neurons off, over tokens and FFNs, each FFN weighed by the tokens it saw."""
    seen = sum(routing.tokens * routing.division.neurons for routing in routings)
    return 1 - sum(routing.neurons_on for routing in routings) / seen


class RoutedFFN(GraftedFFN):
    """An FFN that routes and can be watched; `ExpertFFN` is its only subclass."""

    done = "routed"

    def __init__(self, ffn: FFN) -> None:
        super().__init__(ffn)
        self.observers: list[Callable[[Routing], None]] = []
        """Functions that are called with every decision."""


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
    """While it lasts, calls `observe` with every decision of every FFN.

    Raises:
        ValueError: the model has no routed FFN.
    """
    routed = routed_ffns(model)
    if not routed:
        raise ValueError(f"{type(model).__name__} has no routed FFN to record: convert it first")
    with valid_tokens(model) as tokens, ExitStack() as stack:
        for ffn in routed:
            stack.enter_context(observed(ffn, tokens, observe))
        yield


@contextmanager
def observed(
    ffn: RoutedFFN, tokens: ValidTokens, observe: Callable[[Routing], None]
) -> Iterator[None]:
    """While it lasts, calls `observe` with every decision of one FFN."""

    def see(routing: Routing) -> None:
        valid_T = tokens.of_ffn(ffn, routing.mask_TE)
        observe(routing if valid_T is None else routing._replace(valid_T=valid_T))

    ffn.observers.append(see)
    try:
        yield
    finally:
        ffn.observers.remove(see)


@contextmanager
def observed_with_input(
    ffn: RoutedFFN, tokens: ValidTokens, observe: Callable[[Routing, Tensor], None]
) -> Iterator[None]:
    """While it lasts, calls `observe` with every decision of one FFN and its input x_TD."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def see(routing: Routing) -> None:
        observe(routing, inputs.pop())

    with hooked([ffn.register_forward_pre_hook(keep)]), observed(ffn, tokens, see):
        yield
