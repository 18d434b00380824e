"""When a neuron fires: the one place that says so. Letters: D model width, F neurons."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_tools.hosts.activations import Activation, DReLU
from moe_tools.hosts.projections import Projections


class DecidingRows(NamedTuple):
    """Pre-activations that decide: rows_FD x + bias_F, against a threshold."""

    rows_FD: Tensor
    bias_F: Tensor | None
    threshold: float


def firing_rows(projections: Projections) -> list[DecidingRows]:
    """A neuron is zero unless each of these pre-activations of it is above its threshold.

    They are those of the gate, or of the up projection where there is no gate; under dReLU, of
    both. The rule is ReLU's; SiLU and GELU only come near zero below it.
    """
    weights, act = projections.computed(), projections.act
    threshold = act.threshold if isinstance(act, Activation) else 0.0
    up = DecidingRows(weights.up_FD, weights.up_F, threshold)
    if weights.gate_FD is None:
        return [up]
    gate = DecidingRows(weights.gate_FD, weights.gate_F, threshold)
    return [gate, up] if isinstance(act, DReLU) else [gate]
