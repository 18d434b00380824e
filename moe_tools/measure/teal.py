"""TEAL on a dense model (arXiv 2408.14690): small entries of what enters each FFN matrix are zero.

One threshold a matrix, calibrated to a stated sparsity, decides for each token which columns are
read.

Letters: T tokens, B blocks, D numbers that enter a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.linears import numbers_of
from moe_tools.measure.evaluate import Evaluation
from moe_tools.measure.unions import SIZES, union

SAMPLE = 65536
"""Magnitudes of a batch that are kept at each site, to take a quantile of."""


@dataclass
class Site:
    """A matrix some of whose columns are not read, and how many were."""

    layer: nn.Module
    """Of the FFN."""
    matrix: nn.Module
    threshold: float = 0.0
    magnitudes: list[Tensor] = field(default_factory=list)
    visits: dict[int, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))
    """Tokens of a group -> groups of which a token came here."""
    read: dict[int, float] = field(default_factory=lambda: dict.fromkeys(SIZES, 0.0))
    """Tokens of a group -> weights that the groups read."""

    @property
    def weights(self) -> int:
        """Matrix weights that are read when no value is zero."""
        return numbers_of(self.matrix)

    def add(self, kept_TD: Tensor, place_T: Tensor, tokens: int) -> None:
        """Counts the columns that groups of tokens read together; see `measure.unions`."""
        for size in SIZES:
            kept_GD = union(kept_TD, place_T, tokens, size)
            here_G1 = union(torch.ones_like(kept_TD[:, :1]), place_T, tokens, size)
            self.visits[size] += int(here_G1.sum())
            self.read[size] += self.weights * int(kept_GD.sum()) / kept_TD.shape[1]


@contextmanager
def inputs_dropped(
    model: PreTrainedModel, sparsity: float, calibration_BT: Tensor
) -> Iterator[list[Site]]:
    """While it lasts, the dense model drops its small values; yields where, and what is read.

    Args:
        model: dense; it is as before when the context ends.
        sparsity: share of the values at every site that are zeroed on the calibration text.
        calibration_BT: token blocks for the thresholds.

    Raises:
        ValueError: a routed model, an unknown family, or a sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, but must be in [0, 1)")
    sites = _sites(unfused_ffns(model))
    with _hooked(sites, _keep_magnitudes):
        _run(model, calibration_BT)
    for site in sites:
        if site.magnitudes and sparsity:  # an MoE expert may see no token
            values = torch.cat(site.magnitudes)
            site.threshold = float(values.kthvalue(max(1, round(sparsity * len(values)))).values)
        else:
            site.threshold = -1.0  # nothing is so small
        site.magnitudes.clear()
    with valid_tokens(model) as tokens, _hooked(sites, lambda s, x: _drop(s, x, tokens)):
        yield sites


def read_shares(sites: Sequence[Site]) -> dict[int, float]:
    """Tokens of a group -> share of the FFNs' weights that it read."""
    return {
        size: sum(site.read[size] for site in sites)
        / (sum(site.weights * site.visits[size] for site in sites) or 1)
        for size in SIZES
    }


def with_reads(seen: Evaluation, shares: dict[int, float]) -> Evaluation:
    """The figures of a dense model of whose FFNs such shares were computed and read.

    Args:
        seen: measured as if all was.
        shares: tokens of a group -> share; sizes that are missing are left out.
    """
    one = shares[1]
    flops = replace(seen.flops, ffn=seen.flops.ffn_dense * one)
    read = {
        size: replace(traffic, ffn=traffic.ffn * shares[size])
        for size, traffic in seen.traffic.items()
        if size in shares
    }
    return replace(seen, flops=flops, ffn_sparsity=1 - one, traffic=read)


def _sites(ffns: list[FFN]) -> list[Site]:
    return [Site(ffn.layer, matrix) for ffn in ffns for matrix in ffn.projections.linears()]


Change = Callable[[Site, Tensor], Tensor]


def _hooked(sites: list[Site], change: Change) -> AbstractContextManager[None]:
    def before(site: Site) -> Callable[..., Any]:
        return lambda _, args: (change(site, args[0]), *args[1:])

    return hooked(site.matrix.register_forward_pre_hook(before(site)) for site in sites)


def _keep_magnitudes(site: Site, values: Tensor) -> Tensor:
    flat = values.detach().abs().flatten().float()
    site.magnitudes.append(flat[:: max(1, len(flat) // SAMPLE)].cpu())
    return values


def _drop(site: Site, values: Tensor, tokens: ValidTokens) -> Tensor:
    small = values.abs() <= site.threshold
    valid_T = tokens.of_ffn(site.layer, values)
    kept_TD = ~small.flatten(0, -2)
    if valid_T is not None:
        kept_TD = kept_TD[valid_T.flatten()]
    site.add(kept_TD, *tokens.places(site.layer, values))
    return values.masked_fill(small, 0)


@torch.no_grad()
def _run(model: PreTrainedModel, blocks_BT: Tensor) -> None:
    for block_BT in blocks_BT.split(1):
        model(**model_inputs(model, block_BT.to(model.device)))
