"""Defines the activations that the native backends know by name.

Letters: F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional

ActName = Literal[
    "identity", "relu", "relu2", "fatrelu", "shifted_relu", "silu", "gelu", "gelu_tanh"
]
NAMES: tuple[ActName, ...] = get_args(ActName)
"""All names, in the order of csrc/activation.h."""
GIVES_ZEROS: tuple[ActName, ...] = ("relu", "relu2", "fatrelu", "shifted_relu")
"""Activations that are exactly zero below their threshold: neurons there can be left out."""


@dataclass(frozen=True)
class Act:
    """An activation with a name. A call computes it in PyTorch; kernels compute it by its code.

    Raises:
        ValueError: an unknown name, or a `threshold` that this activation does not have.
    """

    name: ActName
    threshold: float = 0.0
    """fatrelu is x where x >= threshold, else 0 (ProSparse, arXiv 2402.13516); shifted_relu is
    max(x - threshold, 0) (arXiv 2310.04564). Not negative; the others have none."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown activation {self.name!r}; known: {', '.join(NAMES)}")
        limit = float("inf") if self.name in ("fatrelu", "shifted_relu") else 0.0
        if not 0.0 <= self.threshold <= limit:
            raise ValueError(
                f"the threshold is {self.threshold}: {self.name} takes {_thresholds(limit)}"
            )

    @property
    def code(self) -> int:
        """The number that csrc/activation.h gives it."""
        return NAMES.index(self.name)

    def __call__(self, x: Tensor) -> Tensor:
        """Applies the activation to every element."""
        return _FUNCTIONS[self.name](x, self.threshold)


ActivationLike = ActName | Act | Callable[[Tensor], Tensor]
"""A name, a name with its threshold, or any function, which only the reference can run."""


def named(activation: ActivationLike) -> Act | Callable[[Tensor], Tensor]:
    """Turns a name into an `Act`; returns anything else as it is."""
    return Act(activation) if isinstance(activation, str) else activation


def _thresholds(limit: float) -> str:
    return "a number of 0 or more" if limit else "none"


_FUNCTIONS: dict[ActName, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: functional.relu(x),
    "relu2": lambda x, _: functional.relu(x).square(),
    "fatrelu": lambda x, threshold: x.masked_fill(x < threshold, 0.0),
    "shifted_relu": lambda x, threshold: functional.relu(x - threshold),
    "silu": lambda x, _: functional.silu(x),
    "gelu": lambda x, _: functional.gelu(x),
    "gelu_tanh": lambda x, _: functional.gelu(x, approximate="tanh"),
}
