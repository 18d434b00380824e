"""Counts the inputs that thresholds drop while a model runs, and the weights that then go unread.

Letters: T tokens, D numbers of a token that enter a site, G tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.input_threshold import InputThreshold, thresholds_in
from moe_tools.hosts.linears import widths

GROUPS = (4, 16)
"""How many tokens of a batch read their weights together."""


@dataclass
class InputCount:
    """Counts of one site since the count began, summed over its tokens."""

    site: str
    """As in `Conversion.thresholds`."""
    ffn: str
    """Name of the FFN; empty: the site is in an attention."""
    width: int
    """D."""
    reads_per_input: int
    """Matrix weights that one number reads."""
    neurons: int = 0
    """Of the FFN, where a router chooses among them; 0: none does, or it is an attention."""
    hidden: bool = False
    """The numbers are the neurons."""
    tokens: int = 0
    """That the site saw: an expert of an MoE host sees those routed to it."""
    kept: int = 0
    """Numbers that are not dropped and not 0."""
    read: int = 0
    """Matrix weights that these read, of the neurons that a router left on."""
    read_without: int = 0
    """The same without thresholds. What a router turned off is in neither of the two."""
    unions: dict[int, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0.0))
    """G -> numbers that are kept for one of G tokens, which are far apart, summed over groups."""
    groups: dict[int, int] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0))
    """G -> groups of so many tokens."""

    @property
    def weights(self) -> int:
        """Matrix weights that all of its numbers read."""
        return self.reads_per_input * self.width

    @property
    def saves_bytes(self) -> bool:
        """Whether what a dropped number would read is not read: a row of down, or a column.

        What enters gate and up where a router chose neurons lies across their rows. These are read
        whole, for a cache line holds 32 neighbouring inputs in bf16, which are hardly ever all
        dropped: FLOPs are saved there, and no bytes.
        """
        return self.hidden or not self.neurons

    @property
    def sparsity(self) -> float:
        """Share of the numbers that are dropped or 0; 0 before the first token."""
        return 1 - self.kept / (self.tokens * self.width) if self.tokens else 0.0

    def union(self, tokens: int) -> float:
        """Share of D that so many tokens keep together; 1 if no batch had so many tokens."""
        groups = self.groups[tokens]
        return self.unions[tokens] / (groups * self.width) if groups else 1.0

    def add(self, kept_TD: Tensor, on_T: Tensor | None) -> None:
        """Counts one batch.

        Args:
            kept_TD: which numbers are kept.
            on_T: neurons that a router left on; None: there is no router.
        """
        tokens, kept_T = len(kept_TD), kept_TD.sum(-1)
        self.tokens += tokens
        self.kept += int(kept_T.sum())
        if on_T is None:
            self.read += self.reads_per_input * int(kept_T.sum())
            self.read_without += self.reads_per_input * self.width * tokens
        elif self.hidden:
            self.read += self.reads_per_input * int(kept_T.sum())
            self.read_without += self.reads_per_input * int(on_T.sum())
        else:
            matrices = self.reads_per_input // self.neurons
            self.read += matrices * int((kept_T * on_T).sum())
            self.read_without += matrices * self.width * int(on_T.sum())
        for size in GROUPS:
            groups = tokens // size
            apart_GTD = kept_TD[: groups * size].view(size, groups, self.width)
            self.unions[size] += int(apart_GTD.any(0).sum())
            self.groups[size] += groups


def spared(counts: Sequence[InputCount], tokens: int) -> tuple[float, float]:
    """Matrix weights that a token does not read for the sake of thresholds: of FFNs, of the rest.

    Args:
        counts: of a run.
        tokens: of the run.
    """
    saved = {inside: 0 for inside in (True, False)}
    for count in counts:
        saved[bool(count.ffn)] += count.read_without - count.read
    return saved[True] / tokens, saved[False] / tokens


@contextmanager
def count_inputs(model: nn.Module) -> Iterator[list[InputCount]]:
    """Yields a count for every site with a threshold; counts grow with each forward pass.

    Changes no output. Padding, by the attention mask, is not counted. A rotated x is counted as it
    is after the rotation, whose own work is left out: a kernel has it in the weights.
    """
    routed = {ffn.name: ffn for ffn in expert_ffns(model)}
    neurons = {name: ffn.division.neurons for name, ffn in routed.items()}
    found = thresholds_in(model)
    counts = []
    with valid_tokens(model) as tokens, ExitStack() as stack:
        watches = {name: _Watch(ffn, tokens) for name, ffn in routed.items()}
        for watch in watches.values():
            stack.enter_context(_listening(watch.ffn.observers, watch.see_routing))
        for path, threshold in found.items():
            linear = model.get_submodule(path.rpartition(".")[0])
            name, _, role = threshold.site.rpartition(":")
            count = InputCount(
                *(threshold.site, name, _width(linear), threshold.reads),
                neurons=neurons.get(name, 0),
                hidden=role == "hidden",
            )
            counts.append(count)
            module = model.get_submodule(name) if name else linear
            see = _seeing(threshold, count, watches.get(name), module, tokens)
            stack.enter_context(_listening(threshold.observers, see))
        yield counts


def _seeing(
    threshold: InputThreshold,
    count: InputCount,
    watch: _Watch | None,
    module: nn.Module,
    tokens: ValidTokens,
) -> Callable[[Tensor], None]:
    def see(x_TD: Tensor) -> None:
        valid_T = tokens.of_ffn(module, x_TD)
        rows_TD = x_TD.detach().flatten(0, -2) if valid_T is None else x_TD.detach()[valid_T]
        kept_TD = rows_TD.abs() > threshold.at
        if watch is None:
            count.add(kept_TD, None)
        else:
            watch.see_inputs(count, kept_TD)

    return see


class _Watch:
    """Brings together which inputs of a routed FFN are kept and how many neurons are on."""

    def __init__(self, ffn: ExpertFFN, tokens: ValidTokens) -> None:
        self.ffn = ffn
        self._tokens = tokens
        self._on_T: Tensor | None = None
        self._waiting: list[tuple[InputCount, Tensor]] = []

    def see_routing(self, routing: Routing) -> None:
        """The decisions of one batch."""
        valid_T = self._tokens.of_ffn(self.ffn, routing.mask_TE)
        mask_TE = routing._replace(valid_T=valid_T).of_tokens(routing.mask_TE)
        self._on_T = self.ffn.division.spread_TF(mask_TE).sum(-1)
        for count, kept_TD in self._waiting:
            count.add(kept_TD, self._on_T)
        self._waiting.clear()

    def see_inputs(self, count: InputCount, kept_TD: Tensor) -> None:
        """The inputs of one batch: before its decisions, where the host itself computes h."""
        if self.ffn.layout.masked and not count.hidden:
            self._waiting.append((count, kept_TD))
            return
        assert self._on_T is not None
        count.add(kept_TD, self._on_T)


def _width(linear: nn.Module) -> int:
    found = widths(linear)
    assert found is not None
    return found[0]


@contextmanager
def _listening(
    observers: list[Callable[[Any], None]], observe: Callable[[Any], None]
) -> Iterator[None]:
    observers.append(observe)
    try:
        yield
    finally:
        observers.remove(observe)
