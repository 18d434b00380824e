"""Baselines: thresholds on a dense model's own activations, without routers or training.

TEAL (arXiv 2408.14690) zeroes small entries of what enters each matrix; CATS (arXiv 2404.08763)
runs the neurons whose |act(gate)| is large. Both decide per token, by one threshold a matrix or
FFN, calibrated to a stated sparsity.

Letters: T tokens, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.hooks import hooked
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.linears import numbers_of
from moe_tools.hosts.own_gate import OwnGate

Baseline = Literal["teal", "cats"]
SAMPLE = 65536
"""Magnitudes of a batch that are kept at each site, to take a quantile of."""


@dataclass
class Site:
    """A place where small values become zero, and what that saves."""

    module: nn.Module
    before: bool
    """True: at the module's input; False: at its output."""
    weights: int
    """Matrix weights that are read when no value is zero."""
    magnitudes: list[Tensor]
    threshold: float = 0.0
    saved: float = 0.0
    """FLOPs that the zeros save, summed over tokens."""


@contextmanager
def thresholded(
    model: PreTrainedModel, kind: Baseline, sparsity: float, calibration_BT: Tensor
) -> Iterator[list[Site]]:
    """While it lasts, the dense model drops its small values; yields where, and what that saves.

    Args:
        model: dense; it is as before when the context ends.
        kind: teal or cats.
        sparsity: share of the values at every site that are zeroed on the calibration text.
        calibration_BT: token blocks for the thresholds.

    Raises:
        ValueError: a routed model, an unknown family, a sparsity outside [0, 1), or a gate of the
            host's own, which cats does not know.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, but must be in [0, 1)")
    sites = _sites(unfused_ffns(model), kind)
    with _hooked(sites, _keep_magnitudes):
        _run(model, calibration_BT)
    for site in sites:
        if site.magnitudes:  # an MoE expert may see no token
            values = torch.cat(site.magnitudes)
            site.threshold = float(values.kthvalue(max(1, round(sparsity * len(values)))).values)
        site.magnitudes.clear()
    if sparsity == 0:
        yield sites
        return
    with _hooked(sites, _drop):
        yield sites


def _sites(ffns: list[FFN], kind: Baseline) -> list[Site]:
    """The sites, one a module: the experts of an MoE host share their activation."""
    found: dict[int, Site] = {}
    for ffn in ffns:
        parts = ffn.projections
        if kind == "teal":
            for matrix in (parts.gate, parts.up, parts.down):
                if matrix is not None:
                    found[id(matrix)] = Site(matrix, True, numbers_of(matrix), [])
        elif isinstance(parts.act, OwnGate) or ffn.layout.act is None:
            raise ValueError(
                f"{ffn.name}: cats needs |act(gate)|, which is no module of its host: take teal"
            )
        else:
            read = numbers_of(parts.down) * (1 if parts.gate is None else 2)
            found[id(parts.act)] = Site(parts.act, False, read, [])
    return list(found.values())


Change = Callable[[Site, Tensor], Tensor]


def _hooked(sites: list[Site], change: Change) -> AbstractContextManager[None]:
    def before(site: Site) -> Callable[..., Any]:
        return lambda _, args: (change(site, args[0]), *args[1:])

    def after(site: Site) -> Callable[..., Any]:
        return lambda _, __, output: change(site, output)

    return hooked(
        site.module.register_forward_pre_hook(before(site))
        if site.before
        else site.module.register_forward_hook(after(site))
        for site in sites
    )


def _keep_magnitudes(site: Site, values: Tensor) -> Tensor:
    flat = values.detach().abs().flatten().float()
    site.magnitudes.append(flat[:: max(1, len(flat) // SAMPLE)].cpu())
    return values


def _drop(site: Site, values: Tensor) -> Tensor:
    small = values.abs() <= site.threshold
    share = small.float().mean().item()
    site.saved += 2 * site.weights * share * values[..., 0].numel()
    return values.masked_fill(small, 0)


@torch.no_grad()
def _run(model: PreTrainedModel, blocks_BT: Tensor) -> None:
    for block_BT in blocks_BT.split(1):
        model(**model_inputs(model, block_BT.to(model.device)))
