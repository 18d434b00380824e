"""Records what routers decide.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens


def routing_sparsity(routings: Sequence[Routing]) -> float:
    """Share of neurons off, over tokens and FFNs, each FFN weighed by the tokens it saw."""
    seen = sum(routing.tokens * routing.division.neurons for routing in routings)
    return 1 - sum(routing.neurons_on for routing in routings) / seen


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Yields a list that grows by one `Routing` an FFN a forward pass, in forward order.

    Recording changes no output and leaves nothing behind. Tensors keep their graph, so that
    losses on scores can be built from them.

    Raises:
        ValueError: the model has no routed FFN.
    """
    records: list[Routing] = []

    def keep(routing: Routing) -> None:  # records.append is another object in every pass, for
        records.append(routing)  # which torch.compile would compile again

    with observe_routing(model, keep):
        yield records


@contextmanager
def observe_routing(model: nn.Module, observe: Callable[[Routing], None]) -> Iterator[None]:
    """While it lasts, calls `observe` with every decision of every FFN.

    Raises:
        ValueError: the model has no routed FFN.
    """
    routed = expert_ffns(model)
    if not routed:
        raise ValueError(f"{type(model).__name__} has no routed FFN to record: convert it first")
    with valid_tokens(model) as tokens, ExitStack() as stack:
        for ffn in routed:
            stack.enter_context(observed(ffn, tokens, observe))
        yield


@contextmanager
def observed(
    ffn: ExpertFFN, tokens: ValidTokens, observe: Callable[[Routing], None]
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
    ffn: ExpertFFN, tokens: ValidTokens, observe: Callable[[Routing, Tensor], None]
) -> Iterator[None]:
    """While it lasts, calls `observe` with every decision of one FFN and its input x_TD."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def see(routing: Routing) -> None:
        observe(routing, inputs.pop())

    with hooked([ffn.register_forward_pre_hook(keep)]), observed(ffn, tokens, see):
        yield
