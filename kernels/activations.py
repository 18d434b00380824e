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
GIVES_ZEROS: tuple[ActName, ...] = ("relu", "relu2", "fatrelu", "shifted_relu")
"""Exactly zero below their threshold: neurons there can be left out without an error."""


@dataclass(frozen=True)
class Act:
    """An activation with a name: called, it is plain PyTorch; a kernel computes the same.

    Raises:
        ValueError: an unknown name, or a `threshold` that this activation does not have.
    """

    name: ActName
    threshold: float = 0.0
    """Of fatrelu: x where x >= threshold, else 0 (ProSparse, arXiv 2402.13516). Of shifted_relu:
    max(x - threshold, 0) (arXiv 2310.04564). Not negative."""

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
        """Its number in csrc/activation.h."""
        return NAMES.index(self.name)

    def __call__(self, x: Tensor) -> Tensor:
        """Element by element."""
        return _FUNCTIONS[self.name](x, self.threshold)


ActivationLike = ActName | Act | Callable[[Tensor], Tensor]
"""A name, a name with its threshold, or any function, which only the reference can run."""


def named(activation: ActivationLike) -> Act | Callable[[Tensor], Tensor]:
    """An `Act` in place of a name."""
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
