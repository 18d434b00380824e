"""The activations that a native backend knows by name, and what each of them means.

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
"""In the order of csrc/activation.h."""


@dataclass(frozen=True)
class Act:
    """An activation with a name: called, it is plain PyTorch; a kernel computes the same.

    Raises:
        ValueError: an unknown name, or a `theta` that this activation does not have.
    """

    name: ActName
    theta: float = 0.0
    """Of fatrelu: x where x >= theta, else 0 (ProSparse, arXiv 2402.13516). Of shifted_relu:
    max(x - theta, 0) (arXiv 2310.04564). Not negative."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown activation {self.name!r}; known: {', '.join(NAMES)}")
        limit = float("inf") if self.name in ("fatrelu", "shifted_relu") else 0.0
        if not 0.0 <= self.theta <= limit:
            raise ValueError(f"theta is {self.theta}: {self.name} takes {_thetas(limit)}")

    @property
    def code(self) -> int:
        """Its number in csrc/activation.h."""
        return NAMES.index(self.name)

    def __call__(self, x: Tensor) -> Tensor:
        """Element by element."""
        return _FUNCTIONS[self.name](x, self.theta)


Activation = ActName | Act | Callable[[Tensor], Tensor]
"""A name, a name with its theta, or any function, which only the reference can run."""


def named(activation: Activation) -> Act | Callable[[Tensor], Tensor]:
    """An `Act` in place of a name."""
    return Act(activation) if isinstance(activation, str) else activation


def _thetas(limit: float) -> str:
    return "a number of 0 or more" if limit else "none"


_FUNCTIONS: dict[ActName, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: functional.relu(x),
    "relu2": lambda x, _: functional.relu(x).square(),
    "fatrelu": lambda x, theta: x.masked_fill(x < theta, 0.0),
    "shifted_relu": lambda x, theta: functional.relu(x - theta),
    "silu": lambda x, _: functional.silu(x),
    "gelu": lambda x, _: functional.gelu(x),
    "gelu_tanh": lambda x, _: functional.gelu(x, approximate="tanh"),
}
