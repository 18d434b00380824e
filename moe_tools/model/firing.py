"""When a neuron fires: the one place that says so. Letters: D model width, F neurons."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_tools.model.ffn import Projections


class Rows(NamedTuple):
    """Pre-activations that decide: rows_FD x + bias_F."""

    rows_FD: Tensor
    bias_F: Tensor | None


def firing_rows(projections: Projections) -> list[Rows]:
    """A neuron is zero unless each of these pre-activations of it is above 0.

    They are those of the gate, or of the up projection where there is no gate. The rule is ReLU's;
    SiLU and GELU only come near zero below it.
    """
    weights = projections.weights()
    if weights.gate_FD is None:
        return [Rows(weights.up_FD, weights.up_F)]
    return [Rows(weights.gate_FD, weights.gate_F)]
