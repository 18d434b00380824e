"""Where sparsity costs least: the error of every FFN's output, and a greedy way to spend it.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from moe_tools.data import Blocks
from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.selectors import tune_selector
from moe_tools.steps.calibrate import visit_activations

CURVE_POINTS = 20
"""Points of a curve beside the first."""
SAMPLE = 512
"""Tokens of a batch on which errors are measured."""


class Point(NamedTuple):
    """One sparsity of one FFN."""

    saved: float
    """Share of the neurons that a router can turn off, which are off."""
    error: float
    """||y - y_dense||^2 / ||y_dense||^2."""


def error_curves(
    model: nn.Module, ffns: Sequence[ExpertFFN], blocks_BT: Blocks
) -> dict[str, list[Point]]:
    """Name of an FFN -> its error from nothing saved up to the most that its selector can save.

    Measured on the donor's activations. `SAMPLE` tokens of a batch are looked at.
    """
    selectors = [ffn.selector for ffn in ffns]  # the visit runs with every expert on
    off = {ffn.name: [0] * (CURVE_POINTS + 1) for ffn in ffns}
    lost = {ffn.name: [0.0] * (CURVE_POINTS + 1) for ffn in ffns}
    dense, neurons = dict.fromkeys(off, 0.0), dict.fromkeys(off, 0)

    def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
        ffn, chosen = ffns[index], slice(None, None, -(-len(x_TD) // SAMPLE))
        scores_TR, h_TF = ffn.router(x_TD[chosen]), h_TF[chosen]
        down_FD = ffn.weights().down_FD.float()
        dense[ffn.name] += float((h_TF.float() @ down_FD).square().sum())
        neurons[ffn.name] += len(h_TF) * ffn.importance().routed_neurons
        for step in range(CURVE_POINTS + 1):
            mask_TR = tune_selector(selectors[index], scores_TR, 1 - step / CURVE_POINTS)(scores_TR)
            mask_TF = _neuron_mask(ffn, mask_TR)
            off[ffn.name][step] += int((~mask_TF).sum())
            lost_TD = _lost_TF(ffn, h_TF, mask_TF) @ down_FD
            if ffn.off_RD is not None:
                lost_TD -= (~mask_TR).float() @ ffn.off_RD.float()
            lost[ffn.name][step] += float(lost_TD.square().sum())

    visit_activations(model, blocks_BT, visit, title="measure errors")
    return {
        name: [
            Point(saved / neurons[name], error / (dense[name] or 1.0))
            for saved, error in zip(off[name], lost[name], strict=True)
        ]
        for name in off
    }


def _neuron_mask(ffn: ExpertFFN, mask_TR: Tensor) -> Tensor:
    """mask_TF, with the shared experts on."""
    return ffn.division.spread_TF(nn.functional.pad(mask_TR, (ffn.shared, 0), value=True))


def _lost_TF(ffn: ExpertFFN, h_TF: Tensor, mask_TF: Tensor) -> Tensor:
    """What is missing of h, in fp32, when the neurons outside the mask are off."""
    lost_TF = h_TF.float() if ffn.off_F is None else h_TF.float() - ffn.off_F.float()
    return lost_TF.masked_fill(mask_TF, 0)


def spend_by_error(
    curves: Mapping[str, Sequence[Point]], work: Mapping[str, float], saved: float
) -> dict[str, float]:
    """What share of each FFN's work to save: greedily, the step of least error per work is next.

    Args:
        curves: FFN -> its points, rising in what they save.
        work: FFN -> neurons that can be off, times tokens.
        saved: work to save; met exactly, unless all curves end before.
    """
    spent = dict.fromkeys(curves, 0.0)
    queue = [_Offer.of(name, points, work[name]) for name, points in curves.items()]
    offers = [offer for offer in queue if offer is not None]
    heapq.heapify(offers)
    missing = saved
    while missing > 0 and offers:
        offer = heapq.heappop(offers)
        step = min(offer.gain, missing / work[offer.name])
        spent[offer.name] += step
        missing -= step * work[offer.name]
        following = _Offer.of(offer.name, offer.rest, work[offer.name])
        if following is not None:
            heapq.heappush(offers, following)
    return spent


class _Offer(NamedTuple):
    """The next step of one FFN; offers sort by price."""

    price: float
    """Error per work."""
    name: str
    gain: float
    """Share of the FFN's work."""
    rest: Sequence[Point]
    """The points from the one that this step reaches."""

    @classmethod
    def of(cls, name: str, points: Sequence[Point], work: float) -> _Offer | None:
        """The step from the first point to the next one that saves more, if there is one."""
        for index, point in enumerate(points):
            gain = point.saved - points[0].saved
            if gain > 1e-9:
                price = (point.error - points[0].error) / (gain * work)
                return cls(price, name, gain, points[index:])
        return None
