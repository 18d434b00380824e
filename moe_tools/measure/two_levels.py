"""Measures both kinds of sparsity of MoE layers: experts not chosen, neurons off in the others.

TurboSparse (arXiv 2406.05955) counts like this: Mixtral chooses 2 of 8 experts, dReLU turns 85 % of
the neurons inside them off, so that 97 % of the MoE layer does nothing for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_tools.measure.neurons import NeuronCount


@dataclass(frozen=True)
class TwoLevels:
    """Shares of the neurons that do nothing for a token, over tokens and MoE layers."""

    experts: float
    """Share of all neurons that are in experts that the host did not choose."""
    neurons: float
    """Share of the neurons in chosen and shared experts that a router of ours turned off, or that
    are exactly 0."""
    both: float = field(init=False)
    """Share of all neurons, for either reason: 1 - (1 - experts) (1 - neurons)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "both", 1 - (1 - self.experts) * (1 - self.neurons))


def moe_layers(counts: Sequence[NeuronCount]) -> dict[str, TwoLevels]:
    """Name of an MoE layer -> its figures; the shared expert of Qwen2-MoE is one of its experts."""
    names = dict.fromkeys(count.moe_layer for count in counts if count.moe_layer)
    return {name: _levels([count for count in counts if count.moe_layer == name]) for name in names}


def two_levels(counts: Sequence[NeuronCount]) -> TwoLevels | None:
    """The figures of all MoE layers together; None where the host has none, or saw no token."""
    inside = [count for count in counts if count.moe_layer]
    return _levels(inside) if any(count.tokens for count in inside) else None


def _levels(counts: Sequence[NeuronCount]) -> TwoLevels:
    seen = sum(count.seen for count in counts)
    unseen = sum(count.elsewhere * count.neurons for count in counts)
    working = sum(count.working for count in counts)
    return TwoLevels(experts=unseen / (seen + unseen), neurons=1 - working / seen)
