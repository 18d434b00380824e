"""Measures the activation sparsity that a model has without any conversion.

The output of neuron i is n_i = h_i w_i, with w_i its column of W_down, and an FFN's output is their
sum (its bias aside). Three measures of what could be left out:

    zeros    the share of h that is exactly 0: ReLU and its relatives have some
    below    the share of |h| under a threshold, the same everywhere (FAT-eps)
    CETT     cumulative errors of tail truncation: neurons of ||n_i|| <= cut are left out, which
             changes the output by ||sum of their n_i|| / ||sum of all n_i||, averaged over tokens

CETT compares activations fairly, ReLU with SiLU and one layer with another: a stated error gives
each FFN its own cut, and each neuron the cut / ||w_i|| on |h_i| (ReLU^2 Wins, arXiv 2402.03804;
Sparsing Law, arXiv 2411.02335). Every FFN is measured alone, on what the dense model feeds it.

Letters: B blocks, T tokens, D model width, F neurons.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.data.generate import evaluating
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.sampling import sample_rows
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.inputs import run_layers
from moe_tools.hosts.zeros import zero_share

CETT = 0.2
"""The error that ReLU^2 Wins (arXiv 2402.03804) finds to cost little."""
CUTS = 1024
"""How many cuts are tried: sparsity is resolved to a thousandth."""
SAMPLE = 65536
"""How many norms the cuts are quantiles of."""


@dataclass
class Activations:
    """The hidden activations of one FFN on some text."""

    name: str
    hidden_TF: Tensor
    down_FD: Tensor

    def __post_init__(self) -> None:
        self.down_FD = self.down_FD.float()
        self.down_norm_F = self.down_FD.norm(dim=1)
        self.errors: dict[float, float] = {}

    @property
    def zeros(self) -> float:
        """Share of the activations that are exactly 0."""
        return zero_share([self.hidden_TF])

    def below(self, threshold: float) -> float:
        """Share of the activations with |h| < threshold."""
        return (self.hidden_TF.abs() < threshold).float().mean().item()

    def sparsity(self, cut: float) -> float:
        """Share of neurons whose output has at most this norm."""
        return (self._norms_TF() <= cut).float().mean().item()

    def cett(self, cut: float) -> float:
        """Relative error of the output without those neurons; 0 where that output is 0."""
        if cut not in self.errors:
            tail_TF = self.hidden_TF.float().masked_fill(self._norms_TF() > cut, 0)
            error_T = (tail_TF @ self.down_FD).norm(dim=-1)
            self.errors[cut] = (error_T / self._whole_T).mean().item()
        return self.errors[cut]

    def cut(self, cett: float) -> float:
        """The largest of the tried cuts whose error is at most `cett`.

        From 0, which leaves out what is 0 anyway, to infinity; the error is taken to rise with it.
        """
        norms = self._norms_TF().flatten()
        norms = sample_rows(norms, SAMPLE).sort().values
        places = torch.linspace(0, len(norms) - 1, CUTS).round().long()
        cuts = [0.0, *norms[places.unique()].tolist(), math.inf]
        return cuts[bisect.bisect_right(cuts, cett, key=self.cett) - 1]

    @cached_property
    def _whole_T(self) -> Tensor:
        """Norm of the FFN's output for every token: ||sum of all n_i||."""
        whole_T = (self.hidden_TF.float() @ self.down_FD).norm(dim=-1)
        return whole_T.clamp_min(torch.finfo(torch.float32).tiny)

    def _norms_TF(self) -> Tensor:
        """Norms of the neurons' outputs for every token: ||n_i||."""
        return self.hidden_TF.float().abs() * self.down_norm_F


@torch.no_grad()
def observe(model: PreTrainedModel, blocks_BT: Tensor, *, batch_size: int = 4) -> list[Activations]:
    """Keeps what every FFN computes on some text: T x F numbers an FFN, so let the text be short.

    Of a converted model every expert is on: it is the dense model that is looked at. An expert of
    an MoE host is an FFN, on the tokens routed to it; one that saw none is left out.

    Raises:
        ValueError: the model has no FFN of a known family.
    """
    ffns: Sequence[FFN | ExpertFFN] = expert_ffns(model) or unfused_ffns(model)
    kept: list[list[Tensor]] = [[] for _ in ffns]
    handles = (
        ffn.down.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].detach().flatten(0, -2))
        )
        for ffn, seen in zip(ffns, kept, strict=True)
    )
    with hooked(handles), evaluating(model), every_expert_on(model):
        for block_BT in blocks_BT.split(batch_size):
            run_layers(model, block_BT)
    return [
        Activations(ffn.name, torch.cat(seen), ffn.weights().down_FD.detach())
        for ffn, seen in zip(ffns, kept, strict=True)
        if seen
    ]


@dataclass(frozen=True)
class FFNSparsity:
    """The sparsity of one FFN."""

    name: str
    tokens: int
    """Tokens that it saw."""
    neurons: int
    zeros: float
    """Share of h that is exactly 0."""
    sparsity: float
    """Share of neurons that can be left out at the stated CETT."""


@dataclass(frozen=True)
class NaturalSparsity:
    """The sparsity of all FFNs at one error, each weighed by its tokens times its neurons."""

    cett: float
    zeros: float
    sparsity: float
    ffns: tuple[FFNSparsity, ...]


def natural_sparsity(seen: Sequence[Activations], cett: float = CETT) -> NaturalSparsity:
    """The sparsity of a model at one error.

    Raises:
        ValueError: an error that is not in [0, 1].
    """
    if not 0 <= cett <= 1:
        raise ValueError(f"cett is {cett}, but must be in [0, 1]")
    ffns = tuple(_measure(acts, cett) for acts in seen)
    ran = sum(ffn.tokens * ffn.neurons for ffn in ffns)
    zeros = sum(ffn.zeros * ffn.tokens * ffn.neurons for ffn in ffns) / ran
    sparsity = sum(ffn.sparsity * ffn.tokens * ffn.neurons for ffn in ffns) / ran
    return NaturalSparsity(cett, zeros, sparsity, ffns)


def _measure(acts: Activations, cett: float) -> FFNSparsity:
    tokens, neurons = acts.hidden_TF.shape
    return FFNSparsity(acts.name, tokens, neurons, acts.zeros, acts.sparsity(acts.cut(cett)))
