"""Defines the rows of an inspection's tables.

Every `ffn` is a name in the model; experts count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Use = Literal["dead", "used", "always on"]
"""dead: selected for no token; always on: selected for every token the FFN saw."""


@dataclass(frozen=True)
class Decision:
    """What one FFN decided about one token."""

    ffn: str
    token: int
    """Its number among all tokens, in the order the model saw them."""
    text: str
    experts: tuple[int, ...]
    """The experts that are selected."""
    on: float
    """Share of the experts that are selected."""
    margin: float
    """Score minus threshold, of the expert nearest to it: how near the mask was to another."""
    captured: float
    """Share of all experts' output norms that the selected ones have; NaN where not measured."""


@dataclass(frozen=True)
class Score:
    """What one expert of one FFN scored for one token."""

    ffn: str
    token: int
    """Its number among all tokens."""
    expert: int
    score: float
    """The router's score; a shared expert has 1."""
    margin: float
    """Score minus the token's threshold (`Selector.threshold_T1`); infinite for shared experts."""
    selected: bool


@dataclass(frozen=True)
class FFNSummary:
    """One FFN over all tokens it saw."""

    ffn: str
    tokens: int
    num_experts: int
    sparsity: float
    """Share of neurons off."""
    experts_on: float
    """Mean number of experts a token."""
    dead: int
    """Experts that no token selected."""
    always_on: int
    """Experts that every token selected."""
    entropy: float
    """Entropy of the loads as a distribution, over log E: 1 is an even load, 0 one expert alone."""
    near: float
    """Share of the decisions about routed experts within 0.05 of the threshold."""
    captured: float
    """Mean over tokens of the selected experts' share of all output norms; NaN: not measured."""


@dataclass(frozen=True)
class ExpertSummary:
    """One expert over all tokens its FFN saw."""

    ffn: str
    expert: int
    neurons: int
    load: float
    """Share of the tokens that selected it."""
    use: Use
    score: float
    """The mean score."""
    mass: float
    """Share of the FFN's output norms, summed over all tokens, on or off; NaN: not measured."""


@dataclass(frozen=True)
class Pair:
    """Two experts of one FFN, the first the lower one."""

    ffn: str
    expert: int
    other: int
    both: int
    """Tokens that selected both."""
    jaccard: float
    """both / tokens that selected either; 0 where none did."""
    lift: float
    """P(both) / (P(one) P(other)): 1 is chance; NaN where one is dead."""


@dataclass(frozen=True)
class Likeness:
    """Two FFNs of one stack of layers."""

    ffn: str
    other: str
    cka: float
    """CKA of their masks; 1: the same tokens are alike to both. See `Similarity`."""


@dataclass(frozen=True)
class Response:
    """A token that an expert scored highest."""

    ffn: str
    expert: int
    rank: int
    """Place of the score among the expert's; 0 is the highest."""
    score: float
    selected: bool
    token: int
    """Its number among all tokens."""
    before: str
    """The text before the token."""
    text: str
    after: str
    """The text after the token, as far as the same forward pass had it."""


@dataclass(frozen=True)
class Bin:
    """A bar of the histogram of margins of one FFN."""

    ffn: str
    low: float
    """Lower edge of the bar, inclusive: score minus threshold."""
    high: float
    """Upper edge, exclusive."""
    count: int
    """Number of decisions, each about a token and a routed expert."""


@dataclass(frozen=True)
class Overlap:
    """One FFN in two inspections."""

    ffn: str
    load: float
    """sum over experts of min(p, q), loads as distributions: 1 is the same load, 0 disjoint."""
    used: float
    """Jaccard index of the sets of experts that any token selected."""
    mask: float
    """Mean Jaccard index of the two masks of a token, over the kept tokens; NaN where those of the
    two inspections are not the same."""


@dataclass(frozen=True)
class Effect:
    """What an intervention did to the prediction of one token."""

    token: int
    """Its number in the text."""
    text: str
    nats: float
    """-log p of the token, before."""
    change: float
    """nats with the intervention minus without: positive is worse."""
    kl: float
    """KL(before || after) of the whole distribution, nats."""
    best: str
    """The most probable token before."""
    best_after: str
