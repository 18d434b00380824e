"""Activations that an FFN can be given in place of its own, and the one form of what any computes.

Without a gate h = act(up x), with one h = act(gate x) * up x: this holds for the host's own modules
and for all of ours but those that join the two rows in their own way (`JointActivation`).

Letters: T tokens (any leading dimensions), F neurons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import activations as stock

from moe_tools.kernels.activations import Act, ActName
from moe_tools.registry import Registry


class Activation(nn.Module, ABC):
    """An activation that a recipe can name."""

    in_stock: ClassVar[bool] = False
    """transformers' ACT2FN has it, under the same name."""
    threshold: float = 0.0
    """The result is exactly 0 wherever what enters is below."""

    @abstractmethod
    def forward(self, x_TF: Tensor) -> Tensor:
        """What becomes of the gate's row, of the up row where there is no gate."""


class JointActivation(Activation):
    """Needs a gate: what it computes is no product with the up row as it is."""

    @abstractmethod
    def join_TF(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """h_TF from both rows."""


class ReLU(Activation):
    """max(x, 0); in place of SiLU or GELU as in ReLU Strikes Back (arXiv 2310.04564)."""

    in_stock = True

    def forward(self, x_TF: Tensor) -> Tensor:
        return nn.functional.relu(x_TF)


class SquaredReLU(Activation):
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""

    in_stock = True

    def forward(self, x_TF: Tensor) -> Tensor:
        return nn.functional.relu(x_TF).square()


class ShiftedReLU(Activation):
    """max(x - shift, 0): moved, so that it has no jump (ReLU Strikes Back, arXiv 2310.04564).

    FATReLU has the same zeros at theta = shift, and does not move what is left.
    """

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = self.threshold = _checked("shift", shift)

    def forward(self, x_TF: Tensor) -> Tensor:
        return nn.functional.relu(x_TF - self.shift)


class FATReLU(Activation):
    """x where x >= theta, else 0 (ProSparse, arXiv 2402.13516, whose theta is 0.01)."""

    def __init__(self, theta: float = 0.01) -> None:
        super().__init__()
        self.theta = self.threshold = _checked("theta", theta)

    def forward(self, x_TF: Tensor) -> Tensor:
        # not a comparison with >=: NaN stays NaN
        return x_TF.masked_fill(x_TF < self.theta, 0.0)


class Swish(Activation):
    """x sigmoid(beta (x - theta)): SiLU at beta 1 and theta 0 (Swish, arXiv 1710.05941).

    As beta grows it becomes max(x, 0), or with a theta FATReLU: a train step raises it
    (`Train.beta`), and a last `swap` puts the sharp one in its place. Nothing is exactly 0 before.
    """

    threshold = -math.inf

    def __init__(self, beta: float = 1.0, theta: float = 0.0) -> None:
        super().__init__()
        self.beta, self.theta = _checked("beta", beta), _checked("theta", theta)

    def forward(self, x_TF: Tensor) -> Tensor:
        return x_TF * torch.sigmoid(self.beta * (x_TF - self.theta))


class DReLU(JointActivation):
    """max(gate x, 0) * max(up x, 0): a neuron is off when either is (TurboSparse, 2406.05955)."""

    def forward(self, x_TF: Tensor) -> Tensor:
        """The gate's half of it."""
        return nn.functional.relu(x_TF)

    def join_TF(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """h_TF."""
        return self(gate_TF) * nn.functional.relu(up_TF)


class HostOnly(nn.Module):
    """Stands for what only the forward pass of a host knows, see `Layout.masked`."""

    def forward(self, x_TF: Tensor) -> Tensor:
        """Never what the host computes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "this FFN's hidden activations are known to its host alone: it can be split, routed "
            "and trained, but not be given another activation, nor a router that computes neurons"
        )


def _checked(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, but must be a number of 0 or more")
    return float(value)


ACTIVATIONS: Registry[type[Activation]] = Registry(
    "activation",
    {
        "relu": ReLU,
        "relu2": SquaredReLU,
        "shifted_relu": ShiftedReLU,
        "fatrelu": FATReLU,
        "swish_beta": Swish,
        "drelu": DReLU,
    },
)


def build_activation(spec: dict[str, Any]) -> Activation:
    """An activation from its config entry, e.g. {"kind": "fatrelu", "theta": 0.01}.

    Raises:
        ValueError: no or an unknown kind, or arguments that this kind does not take.
    """
    built: Activation = ACTIVATIONS.build(spec)
    return built


KERNEL_ACTS: dict[type[nn.Module], ActName] = {
    nn.ReLU: "relu",
    ReLU: "relu",
    DReLU: "relu",
    stock.ReLUSquaredActivation: "relu2",
    SquaredReLU: "relu2",
    FATReLU: "fatrelu",
    ShiftedReLU: "shifted_relu",
    nn.SiLU: "silu",
    stock.SiLUActivation: "silu",
    stock.GELUActivation: "gelu",
    stock.NewGELUActivation: "gelu_tanh",
    stock.GELUTanh: "gelu_tanh",
}
"""Class of an activation, a host's or ours -> what the kernels call it. A subclass is another."""


def kernel_act(module: nn.Module) -> Act | None:
    """An activation in the words of the kernels, None where none of them computes it."""
    if type(module) not in KERNEL_ACTS:
        return None
    return Act(
        KERNEL_ACTS[type(module)], module.threshold if isinstance(module, Activation) else 0.0
    )


def kernel_up_act(module: nn.Module) -> ActName:
    """What becomes of the up row of a gated FFN with this activation."""
    return "relu" if isinstance(module, DReLU) else "identity"
