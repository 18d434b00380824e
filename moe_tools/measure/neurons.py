"""Which neurons run: counted while a model runs, with a few integers an FFN and no stored mask.

Letters: T tokens, D model width, F neurons of one FFN, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from moe_tools.model.experts import ExpertFFN, expert_ffns
from moe_tools.model.ffn import FFN, find_ffns
from moe_tools.model.moe_host import HostExperts
from moe_tools.model.projections import Weights
from moe_tools.model.routing import Routing
from moe_tools.model.zeros import gives_zeros


@dataclass
class NeuronCount:
    """What one FFN has done since the count began."""

    name: str
    neurons: int
    weights: int
    """Matrix weights of all its neurons: gate, up and down."""
    routed: bool = False
    router_flops: int = 0
    """Matrix FLOPs of routing one token."""
    tokens: int = 0
    """Tokens the FFN saw: an expert of an MoE host sees only those routed to it."""
    on: int = 0
    """Neurons that ran, summed over those tokens."""
    zeros: int | None = None
    """Those that were exactly 0, of a dense FFN whose activation gives zeros."""
    elsewhere: int = 0
    """Tokens that an MoE host gave to other experts of the layer."""

    @property
    def working(self) -> int:
        """Neurons that ran, and not for nothing."""
        return self.on - (self.zeros or 0)

    @property
    def seen(self) -> int:
        """Neurons that could have run."""
        return self.tokens * self.neurons

    @property
    def sparsity(self) -> float:
        """Share of neurons off; 0 before the first token."""
        return 1 - self.on / self.seen if self.tokens else 0.0

    def add(self, tokens: int, on: int) -> None:
        """Counts one batch."""
        self.tokens += tokens
        self.on += on


def sparsity(counts: list[NeuronCount]) -> float:
    """Share of neurons off over tokens and FFNs, each FFN weighed by the tokens it saw."""
    seen = sum(count.seen for count in counts)
    return 1 - sum(count.on for count in counts) / seen if seen else 0.0


def zeros(counts: list[NeuronCount]) -> float | None:
    """Share of exact zeros over tokens and FFNs; None where no activation gives any."""
    counted = [count for count in counts if count.zeros is not None and count.seen]
    if not counted:
        return None
    return sum(count.zeros or 0 for count in counted) / sum(count.seen for count in counted)


def two_level_sparsity(counts: list[NeuronCount]) -> float | None:
    """The same, where the experts that an MoE host did not choose for a token are off, too.

    So are neurons that are exactly 0, as TurboSparse (arXiv 2406.05955) counts both levels; among
    the neurons that a router of ours turned on, zeros are not counted. None where the host has no
    experts of its own, or chose all of them.
    """
    unseen = sum(count.elsewhere * count.neurons for count in counts)
    seen = sum(count.seen for count in counts)
    return 1 - sum(count.working for count in counts) / (seen + unseen) if unseen else None


@contextmanager
def count_neurons(model: nn.Module) -> Iterator[list[NeuronCount]]:
    """Yields a count for every FFN, in forward order; counts grow with each forward pass.

    Works for routed and for dense models, where every neuron is on. Changes no output. The fused
    experts of a dense MoE host are taken apart in place, as `find_ffns` does.

    Raises:
        ValueError: the model has no FFN of a known family.
    """
    routed = expert_ffns(model)
    dense = [] if routed else find_ffns(model)
    ffns: Sequence[ExpertFFN | FFN] = routed or dense
    counts = [_count(ffn.name, ffn.weights()) for ffn in ffns]
    running = _observe(routed, counts) if routed else _hook(dense, counts)
    with running, _count_elsewhere(model, {count.name: count for count in counts}):
        yield counts


def _count(name: str, weights: Weights) -> NeuronCount:
    numbers = sum(matrix.numel() for matrix in weights.matrices())
    return NeuronCount(name, len(weights.up_FD), numbers)


@contextmanager
def _observe(ffns: list[ExpertFFN], counts: list[NeuronCount]) -> Iterator[None]:
    def observer(count: NeuronCount) -> Callable[[Routing], None]:
        def observe(routing: Routing) -> None:
            count.add(routing.tokens, routing.neurons_on)

        return observe

    observers = [observer(count) for count in counts]
    for ffn, count, observe in zip(ffns, counts, observers, strict=True):
        count.routed, count.router_flops = True, ffn.router.flops()
        ffn.observers.append(observe)
    try:
        yield
    finally:
        for ffn, observe in zip(ffns, observers, strict=True):
            ffn.observers.remove(observe)


@contextmanager
def _count_elsewhere(model: nn.Module, counts: dict[str, NeuronCount]) -> Iterator[None]:
    def hook(experts: list[NeuronCount]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for index, count in enumerate(experts):
                count.elsewhere += int((args[1] != index).all(-1).sum())  # chosen_TK

        return see

    hosts = [(path, m) for path, m in model.named_modules() if isinstance(m, HostExperts)]
    handles = [
        host.register_forward_pre_hook(hook([counts[f"{path}.{i}"] for i in range(len(host))]))
        for path, host in hosts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hook(ffns: list[FFN], counts: list[NeuronCount]) -> Iterator[None]:
    def hook(ffn: FFN, count: NeuronCount) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        if gives_zeros(ffn.act):
            count.zeros = 0

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0][..., 0].numel()
            count.add(tokens, tokens * count.neurons)
            if count.zeros is not None:
                count.zeros += int((args[0] == 0).sum())

        return see

    handles = [
        ffn.down.register_forward_pre_hook(hook(ffn, count))
        for ffn, count in zip(ffns, counts, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
