"""Counts which share of the neurons is off while a model serves.

Who looks at a routing decision keeps an optimised FFN from deciding inside its kernels: that costs
time, so that only one pass in so many is looked at.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.inference.prompt_ffn import prompt_ffns

EVERY_PACKED = 16
"""One pass in so many is looked at in an optimised model."""


class Count(NamedTuple):
    """Neurons that could have run and those that did, summed over tokens and FFNs."""

    seen: int = 0
    on: int = 0

    def since(self, before: Count) -> Count:
        """What was counted since then."""
        return Count(self.seen - before.seen, self.on - before.on)

    @property
    def sparsity(self) -> float | None:
        """Share of neurons off; None: nothing was seen."""
        return 1 - self.on / self.seen if self.seen else None


class Watch:
    """Looks at the decisions of a model's routers, in one of `every` passes; 0: in none.

    Called by the thread alone that computes. Of a model that selects by the prompt, what ran after
    the prompt is known without looking.
    """

    def __init__(self, model: nn.Module, every: int | None = None) -> None:
        self._ffns = expert_ffns(model)
        self._selected = prompt_ffns(model)
        packed = any(ffn.packed is not None for ffn in self._ffns)
        self.every = (EVERY_PACKED if packed else 1) if every is None else every
        self._passes = 0
        self._count = Count()

    @property
    def is_whole(self) -> bool:
        """Whether every pass is counted."""
        return bool(self._selected) or self.every == 1

    @property
    def sees(self) -> bool:
        """Whether there is anything to count."""
        return bool(self._selected or (self._ffns and self.every))

    def next_pass(self) -> None:
        """Before a forward pass: looks at it, or does not."""
        if not self.every:
            return
        look = self._passes % self.every == 0
        self._passes += 1
        for ffn in self._ffns:
            self._set(ffn, look)

    def close(self) -> None:
        """Looks away."""
        for ffn in self._ffns:
            self._set(ffn, False)

    def settle(self) -> None:
        """Behind a text: adds what FFNs that select by the prompt counted since it began."""
        self._add(sum(ffn.could for ffn in self._selected), sum(ffn.ran for ffn in self._selected))

    @property
    def count(self) -> Count:
        """All so far; any thread may ask."""
        return self._count

    def _set(self, ffn: ExpertFFN, look: bool) -> None:
        looks = self._see in ffn.observers
        if look and not looks:
            ffn.observers.append(self._see)
        elif looks and not look:
            ffn.observers.remove(self._see)

    def _see(self, routing: Routing) -> None:
        self._add(routing.tokens * routing.division.neurons, routing.neurons_on)

    def _add(self, seen: int, on: int) -> None:
        self._count = Count(self._count.seen + seen, self._count.on + on)
