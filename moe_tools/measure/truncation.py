"""Measures PPL-p% sparsity: how many neurons can go before perplexity rises by p %.

As algorithm 1 of Sparsing Law (arXiv 2411.02335), CETT-PPL-p%: all FFNs share one relative error,
each has the cut that causes it (`Activations.cut`), and the shared error is bisected until the
model without the neurons below has a perplexity that is p % above the dense one's.

Letters: B blocks, T tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.natural import observe

HALVINGS = 10
"""Bisections of the interval [0, 1] of errors: the error is known to a thousandth."""


@dataclass
class Truncated:
    """Counts of neurons of all FFNs under their cuts."""

    seen: int = 0
    """Neurons, summed over tokens and FFNs."""
    left_out: int = 0

    @property
    def sparsity(self) -> float:
        """Share of neurons left out; 0 before the first token."""
        return self.left_out / max(1, self.seen)


@dataclass(frozen=True)
class Tolerance:
    """The sparsity that a rise of perplexity buys."""

    increase: float
    """The allowed rise, as a share of the dense perplexity."""
    perplexity: float
    """Perplexity with the neurons left out."""
    dense_perplexity: float
    cett: float
    """The relative error that all FFNs share."""
    sparsity: float
    """Share of neurons left out, over tokens and FFNs."""


@contextmanager
def truncated(model: nn.Module, cuts: dict[str, float]) -> Iterator[Truncated]:
    """While it lasts, neurons whose output has at most the FFN's cut for a norm are left out.

    Args:
        model: dense, or converted, whose experts are then all on.
        cuts: name of an FFN -> cut; an FFN without one is left alone.
    """
    ffns: Sequence[FFN | ExpertFFN] = expert_ffns(model) or unfused_ffns(model)
    count = Truncated()
    with valid_tokens(model) as tokens:
        handles = (
            ffn.down.register_forward_pre_hook(_drop(ffn, cuts[ffn.name], count, tokens))
            for ffn in ffns
            if ffn.name in cuts
        )
        with hooked(handles), every_expert_on(model):
            yield count


def _drop(
    ffn: FFN | ExpertFFN, cut: float, count: Truncated, tokens: ValidTokens
) -> Callable[..., tuple[Tensor, ...]]:
    norm_F = ffn.weights().down_norm_F
    module = ffn if isinstance(ffn, ExpertFFN) else ffn.layer

    def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        small_TF = args[0].float().abs() * norm_F <= cut
        valid_T = tokens.of_ffn(module, small_TF)
        counted = small_TF if valid_T is None else small_TF[valid_T]
        count.seen += counted.numel()
        count.left_out += int(counted.sum())
        return (args[0].masked_fill(small_TF, 0), *args[1:])

    return drop


def sparsity_within(
    model: PreTrainedModel, blocks_BT: Tensor, increase: float = 0.01, *, batch_size: int = 4
) -> Tolerance:
    """The largest sparsity whose perplexity is within `increase` of the dense model's.

    As in the paper's code, the text that sets the cuts is the one that is measured, and neurons are
    counted while the others are left out.

    Args:
        model: a causal language model; a converted one is measured with every expert on.
        blocks_BT: its activations are kept in memory.
        increase: p as a share, not in per cent.
        batch_size: blocks of one forward pass.

    Raises:
        ValueError: `increase` is not above 0, or what `evaluate` refuses.
    """
    if not increase > 0:
        raise ValueError(f"the increase is {increase}, but must be above 0, e.g. 0.01 for 1 %")
    seen = observe(model, blocks_BT, batch_size=batch_size)

    def measure(cett: float) -> tuple[float, float]:
        with truncated(model, {acts.name: acts.cut(cett) for acts in seen}) as count:
            return evaluate(model, blocks_BT, batch_size=batch_size).perplexity, count.sparsity

    with truncated(model, {}):
        dense = evaluate(model, blocks_BT, batch_size=batch_size).perplexity
    low, high, best = 0.0, 1.0, measure(0.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = measure(middle)
        if found[0] <= dense * (1 + increase):
            low, best = middle, found
        else:
            high = middle
    return Tolerance(increase, best[0], dense, low, best[1])
