"""Bytes of weights that a forward pass reads: what one token costs where memory is the limit.

Weights count as bf16, whatever dtype they are evaluated in, for that is what a model is stored and
run in; the matrices of FFNs that lie on a grid of 8 or 4 bits (`weight_bits`) as that: 8.5 or 4.5
bits a number, a bf16 scale for 32 of them included. Every matrix that is applied is read once a
pass, the head whole; of an FFN the neurons that are on, and what the router reads to decide. An MoE
host reads the experts that it chose. A row of an embedding is nothing, and the KV cache is no
weight: both are left out, like the vectors that FLOPs leave out, too (biases, norms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_tools.kernels.few_bits import bits_each
from moe_tools.measure.flops import FlopCounter
from moe_tools.measure.inputs import InputCount, spared
from moe_tools.measure.neurons import NeuronCount
from moe_tools.measure.unions import SIZES, Union


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights that a pass over `tokens` tokens of as many sequences reads, on average."""

    tokens: int
    ffn_dense: float
    """Of the FFNs in bf16 with every neuron on; of MoE hosts, of the experts that were chosen."""
    ffn: float
    """Of the FFNs' neurons that are on for one of the tokens, without what scoring had read."""
    scoring: float
    """What our routers read to decide."""
    rest: float
    """Attention, the head, an MoE host's own router, with all inputs; not the KV cache."""
    spared: float = 0.0
    """What of the rest is not read, as thresholds drop its inputs."""
    total: float = field(init=False)
    """ffn + scoring + rest - spared."""
    total_dense: float = field(init=False)
    """ffn_dense + rest."""

    @property
    def ffn_share(self) -> float:
        """Bytes of the FFNs and of scoring, over those of the dense FFNs in bf16."""
        return (self.ffn + self.scoring) / self.ffn_dense

    @property
    def per_token(self) -> float:
        """Bytes of the pass over its tokens."""
        return self.total / self.tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.ffn + self.scoring + self.rest - self.spared)
        object.__setattr__(self, "total_dense", self.ffn_dense + self.rest)


def traffic(
    counts: Sequence[NeuronCount],
    others: FlopCounter,
    weight_bits: int | None = None,
    inputs: Sequence[InputCount] = (),
) -> dict[int, Traffic]:
    """Tokens of a pass -> what it reads, from what was counted while a model ran.

    Args:
        counts: of the FFNs.
        others: of everything else.
        weight_bits: 8 or 4: those of the FFNs' matrices; None: bf16.
        inputs: what thresholds dropped, whose columns then go unread, but those across rows that
            a router chose. A group reads the columns that one of its tokens keeps.

    Returns:
        An entry for each of `SIZES`, but for those above the tokens of every pass; and for 1 alone
        where thresholds are in routed FFNs, or in an MoE host's experts: which of the inputs and
        which of the neurons tokens share would have to be known at once.
    """
    found = {}
    for size in SIZES:
        seen = [(count, count.unions[size]) for count in counts if count.unions[size].groups]
        if not seen:
            continue
        parts = [_of_ffn(count, union, others.passes, weight_bits) for count, union in seen]
        dense, ffn, scoring = (sum(part) for part in zip(*parts, strict=True))
        rest = 2 * others.read / others.passes
        unread = _unread(inputs, counts, size)
        if unread is None:
            continue
        ffn -= unread[0] * bits_each(weight_bits) / 8
        found[size] = Traffic(size, dense, ffn, scoring, rest, spared=2 * unread[1])
    return found


def _unread(
    inputs: Sequence[InputCount], counts: Sequence[NeuronCount], size: int
) -> tuple[float, float] | None:
    """Matrix weights of FFNs, and of attentions, that a pass does not read for dropped inputs.

    None: not known of so many tokens.
    """
    if not inputs:
        return 0.0, 0.0
    if size == 1:
        saving = [one for one in inputs if one.saves_bytes]
        return spared(saving, counts[0].unions[1].groups)
    if any(count.routed or count.elsewhere for count in counts):
        return None
    parts = [
        sum(one.weights * (1 - one.union(size)) for one in inputs if bool(one.ffn) is inside)
        for inside in (True, False)
    ]
    return parts[0], parts[1]


def _of_ffn(
    count: NeuronCount, union: Union, passes: int, weight_bits: int | None
) -> tuple[float, float, float]:
    """Bytes of one FFN in a pass: dense, of what ran, of scoring."""
    times = count.calls / passes / union.groups / 8
    neuron = count.weights / count.neurons
    dense = 16 * count.weights * union.visits * times
    if count.scoring is None:
        return dense, bits_each(weight_bits) * count.weights * union.visits * times, 0.0
    known = count.scoring.known_bits * count.known(union)
    rows = bits_each(weight_bits) * neuron * union.neurons - known
    ffn = (rows + 16 * count.constant * union.experts) * times
    return dense, ffn, count.scoring.bits * union.visits * times
