"""Counts neurons while a model runs, with a few integers for each FFN and no stored mask.

Letters: T tokens, D model width, F neurons of one FFN, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_tools.experts.conversion import read_block
from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.routers.base import Scoring
from moe_tools.experts.routing import observed
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.measure.unions import SIZES, Union

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""Sees a module and the inputs of its forward pass."""


@dataclass
class NeuronCount:
    """Counts of one FFN since the count began."""

    name: str
    neurons: int
    weights: int
    """Matrix weights of all its neurons: gate, up and down."""
    scoring: Scoring | None = None
    """What routing one token takes; None: it is dense."""
    constant: int = 0
    """Numbers of what each expert adds when it is off (`refit`); 0: nothing. A kernel knows their
    sum, and reads those of the experts that are on to take them from it."""
    calls: int = field(default=0, compare=False)
    """Of the layer that it is in."""
    unions: dict[int, Union] = field(
        default_factory=lambda: {size: Union(size) for size in SIZES}, compare=False
    )
    """Tokens of a group -> what such groups read of it."""
    tokens: int = 0
    """Tokens the FFN saw: an expert of an MoE host sees only those routed to it."""
    on: int = 0
    """Neurons that ran, summed over those tokens."""
    zeros: int | None = None
    """Neurons that ran and were exactly 0; None where the activation gives no zeros, or nothing was
    seen of it (no token yet, or an optimised FFN)."""
    moe_layer: str = ""
    """Path of the MoE layer that the FFN is an expert of; empty: it is none."""
    elsewhere: int = 0
    """Tokens that an MoE host gave to other experts of the layer."""

    @property
    def routed(self) -> bool:
        """Whether it has a router of ours."""
        return self.scoring is not None

    def known(self, union: Union) -> int:
        """Neurons of those that ran for groups of tokens of which scoring knew something before."""
        assert self.scoring is not None
        return union.neurons if self.scoring.known_of == "neuron" else union.experts

    @property
    def working(self) -> int:
        """Neurons that ran and were not 0."""
        return self.on - (self.zeros or 0)

    @property
    def seen(self) -> int:
        """Neurons that could have run."""
        return self.tokens * self.neurons

    @property
    def sparsity(self) -> float:
        """Share of neurons off; 0 before the first token."""
        return 1 - self.on / self.seen if self.tokens else 0.0

    def call(self, tokens: int) -> None:
        """Counts a call of its layer with so many tokens, wherever an MoE host gave them to."""
        self.calls += 1
        for one in self.unions.values():
            one.groups += tokens // one.size

    def add(self, tokens: int, on: int) -> None:
        """Counts one batch."""
        self.tokens += tokens
        self.on += on

    def add_zeros(self, zero_TF: Tensor) -> None:
        """Counts neurons of one batch that ran and were 0."""
        self.zeros = (self.zeros or 0) + int(zero_TF.sum())


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

    Works for routed and for dense models, where every neuron is on. Changes no output. What the
    attention mask says is padding is not counted. The fused
    experts of a dense MoE host are taken apart in place, as `unfused_ffns` does.

    Raises:
        ValueError: the model has no FFN of a known family.
    """
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or unfused_ffns(model)
    bits = weight_bits(model)
    counts = [_count(ffn, bits) for ffn in ffns]
    with valid_tokens(model) as tokens, ExitStack() as watches:
        watches.enter_context(hooked(_count_elsewhere(model, counts, tokens)))
        for ffn, count in zip(ffns, counts, strict=True):
            watches.enter_context(_watch(ffn, count, tokens))
        yield counts


def weight_bits(model: nn.Module) -> int | None:
    """Bits of a number in the matrices of a model's FFNs, as its config says; None: bf16."""
    block = read_block(getattr(model, "config", None))
    return None if block is None else block.weight_bits


def _count(ffn: ExpertFFN | FFN, bits: int | None) -> NeuronCount:
    parts = ffn.projections
    count = NeuronCount(ffn.name, parts.size[0], parts.numbers)
    if isinstance(ffn, ExpertFFN):
        count.scoring = ffn.router.scoring(bits)
        count.constant = 0 if ffn.off_RD is None else parts.size[1]
    return count


def _watch(
    ffn: ExpertFFN | FFN, count: NeuronCount, tokens: ValidTokens
) -> AbstractContextManager[None]:
    if isinstance(ffn, ExpertFFN):
        return _watch_routed(ffn, count, tokens)
    return hooked([ffn.down.register_forward_pre_hook(_dense(ffn, count, tokens))])


@contextmanager
def _watch_routed(ffn: ExpertFFN, count: NeuronCount, tokens: ValidTokens) -> Iterator[None]:
    """Counts the neurons that the router turns on, and those among them that are 0 all the same."""
    latest: list[Routing] = []

    def observe(routing: Routing) -> None:
        count.add(routing.tokens, routing.neurons_on)
        _add_masks(ffn, count, routing, tokens)
        latest[:] = [routing]

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        routing = latest.pop()
        zero_TF = (args[0] == 0) & ffn.division.spread_TF(routing.mask_TE)
        count.add_zeros(routing.of_tokens(zero_TF))

    handles = [ffn.down.register_forward_pre_hook(see)] if gives_zeros(ffn.projections.act) else []
    with hooked(handles), observed(ffn, tokens, observe):
        yield


def _add_masks(ffn: ExpertFFN, count: NeuronCount, routing: Routing, tokens: ValidTokens) -> None:
    """Counts what groups of tokens turned on together."""
    place_T, passed = tokens.places(ffn, routing.mask_TE)
    if tokens.rows_T(ffn) is None:
        count.call(passed)
    mask_TE = routing.of_tokens(routing.mask_TE)
    for one in count.unions.values():
        one.add_mask(mask_TE, routing.division, routing.shared, place_T, passed)


def _dense(ffn: FFN, count: NeuronCount, tokens: ValidTokens) -> Hook:
    """A hook that counts every neuron as on, and those that the activation leaves at 0."""
    has_zeros = gives_zeros(ffn.act)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        h_TF = args[0].reshape(-1, count.neurons)
        valid_T = tokens.of_ffn(ffn.layer, h_TF)
        if valid_T is not None:
            h_TF = h_TF[valid_T]
        count.add(len(h_TF), h_TF.numel())
        place_T, passed = tokens.places(ffn.layer, args[0])
        if tokens.rows_T(ffn.layer) is None:
            count.call(passed)
        for one in count.unions.values():
            one.add(place_T, passed)
        if has_zeros:
            count.add_zeros(h_TF == 0)

    return see


def _count_elsewhere(
    model: nn.Module, counts: list[NeuronCount], tokens: ValidTokens
) -> Iterator[RemovableHandle]:
    """Notes which FFNs are experts of an MoE host; hooks count the tokens that each did not get."""
    named = {count.name: count for count in counts}
    for path, host in model.named_modules():
        if isinstance(host, HostExperts):
            layer = path.rpartition(".")[0]
            for name in named:
                if name.startswith(f"{layer}."):
                    named[name].moe_layer = layer
            experts = [named[f"{path}.{index}"] for index in range(len(host))]
            yield host.register_forward_pre_hook(_elsewhere(experts, tokens))


def _elsewhere(experts: list[NeuronCount], tokens: ValidTokens) -> Hook:
    def see(host: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(host, HostExperts)
        chosen_TK = host.chosen_TK(args)
        valid_T = tokens.of_ffn(host, chosen_TK)
        if valid_T is not None:
            chosen_TK = chosen_TK[valid_T]
        for index, count in enumerate(experts):
            count.call(len(chosen_TK))
            count.elsewhere += int((chosen_TK != index).all(-1).sum())

    return see
