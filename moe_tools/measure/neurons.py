"""Which neurons run: counted while a model runs, with a few integers an FFN and no stored mask.

Letters: T tokens, D model width, F neurons of one FFN, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.routing import Routing
from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.kernels.weights import FFNWeights

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""Sees a module and the inputs of its forward pass."""


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
    """Those of them that were exactly 0; None where the activation gives no zeros, or nothing was
    seen of it (no token yet, or an optimised FFN)."""
    moe_layer: str = ""
    """Path of the MoE host's layer that it is an expert of; empty: of none."""
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
    """Share of exact zeros among the neurons that ran, over tokens and FFNs.

    Of a dense model that is all of them. None where no activation gives zeros, or none ran.
    """
    counted = [count for count in counts if count.zeros is not None and count.on]
    if not counted:
        return None
    return sum(count.zeros or 0 for count in counted) / sum(count.on for count in counted)


@contextmanager
def count_neurons(model: nn.Module) -> Iterator[list[NeuronCount]]:
    """Yields a count for every FFN, in forward order; counts grow with each forward pass.

    Works for routed and for dense models, where every neuron is on. Changes no output. The fused
    experts of a dense MoE host are taken apart in place, as `find_ffns` does.

    Raises:
        ValueError: the model has no FFN of a known family.
    """
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or find_ffns(model)
    counts = [_count(ffn.name, ffn.weights()) for ffn in ffns]
    with ExitStack() as watches:
        for ffn, count in zip(ffns, counts, strict=True):
            watches.enter_context(_watch(ffn, count))
        watches.enter_context(_count_elsewhere(model, counts))
        yield counts


def _count(name: str, weights: FFNWeights) -> NeuronCount:
    numbers = sum(matrix.numel() for matrix in weights.matrices())
    return NeuronCount(name, len(weights.up_FD), numbers)


def _watch(ffn: ExpertFFN | FFN, count: NeuronCount) -> AbstractContextManager[None]:
    return _watch_routed(ffn, count) if isinstance(ffn, ExpertFFN) else _watch_dense(ffn, count)


@contextmanager
def _watch_routed(ffn: ExpertFFN, count: NeuronCount) -> Iterator[None]:
    """What its router turns on; and among that, what the activation leaves at 0."""
    count.routed, count.router_flops = True, ffn.router.flops()
    latest: list[Routing] = []

    def observe(routing: Routing) -> None:
        count.add(routing.tokens, routing.neurons_on)
        latest[:] = [routing]

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        mask_TF = ffn.division.spread_TF(latest.pop().mask_TE)
        count.zeros = (count.zeros or 0) + int(((args[0] == 0) & mask_TF).sum())

    ffn.observers.append(observe)
    try:
        with _before(ffn.down, see) if gives_zeros(ffn.projections.act) else nullcontext():
            yield
    finally:
        ffn.observers.remove(observe)


@contextmanager
def _watch_dense(ffn: FFN, count: NeuronCount) -> Iterator[None]:
    """Every neuron runs; what the activation leaves at 0."""
    has_zeros = gives_zeros(ffn.act)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0][..., 0].numel()
        count.add(tokens, tokens * count.neurons)
        if has_zeros:
            count.zeros = (count.zeros or 0) + int((args[0] == 0).sum())

    with _before(ffn.down, see):
        yield


@contextmanager
def _count_elsewhere(model: nn.Module, counts: list[NeuronCount]) -> Iterator[None]:
    """Which FFNs are experts of an MoE host, and how many tokens each did not get."""
    named = {count.name: count for count in counts}
    with ExitStack() as watches:
        for path, host in model.named_modules():
            if isinstance(host, HostExperts):
                layer = path.rpartition(".")[0]
                for name in named:
                    if name.startswith(f"{layer}."):
                        named[name].moe_layer = layer
                experts = [named[f"{path}.{index}"] for index in range(len(host))]
                watches.enter_context(_before(host, _elsewhere(experts)))
        yield


def _elsewhere(experts: list[NeuronCount]) -> Hook:
    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        for index, count in enumerate(experts):
            count.elsewhere += int((args[1] != index).all(-1).sum())  # chosen_TK

    return see


@contextmanager
def _before(module: nn.Module, hook: Hook) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
