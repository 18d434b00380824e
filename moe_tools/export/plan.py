"""What every format has: a plan that refuses before a weight is read, and its way back.

Letters: B blocks, T tokens, D model width, R experts that are routed, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from moe_tools.export.source import Source

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
"""How a GGUF file stores matrices."""


@dataclass(frozen=True)
class Options:
    """What a user may say about the file; a format refuses what it has no use for."""

    dtype: torch.dtype | None = None
    """Of the weights; None: as they are stored."""
    type: Kind | None = None
    """Of the matrices of a GGUF file; None: f16."""
    tokenizer: str | None = None
    """A GGUF file whose tokenizer is copied; None: that of the donor, if it is one."""
    top_k: int | None = None
    """Routed experts of every token in place of the folder's own selector; None: as it says."""

    def only(self, target: str, *taken: str) -> None:
        """Checks that nothing is given but what a format takes.

        Raises:
            ValueError: something else is given.
        """
        for each in fields(self):
            if each.name not in taken and getattr(self, each.name) is not None:
                name = each.name.replace("_", "-")
                raise ValueError(f"--{name} says nothing about the format {target}: leave it out")


class FFNOutput(NamedTuple):
    """What a written FFN makes of its input."""

    y_TD: Tensor
    chosen_TR: Tensor | None
    """Which routed experts ran; None: it has none."""


class Written(ABC):
    """A written model, read back to be compared with ours, in fp32."""

    @abstractmethod
    def ffn(self, layer: int, x_TD: Tensor, residual_TD: Tensor) -> FFNOutput:
        """The FFN of a layer.

        Args:
            layer: its number.
            x_TD: what ours gets.
            residual_TD: what the norm before it got.
        """

    @abstractmethod
    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV of the whole model."""


class Plan(ABC):
    """What will be written, by the config alone."""

    compared: ClassVar[bool] = False
    """Whether it is read back (`read_back`) and compared with the source."""
    is_file: ClassVar[bool] = False
    """Whether one file is written, rather than a folder."""

    @property
    def routed(self) -> bool:
        """Whether what is written chooses among experts; else every neuron runs."""
        return False

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What the weights are rounded to, groups of few bits aside; None: they stay."""
        return None

    @property
    def limits(self) -> Limits | None:
        """How far it may be from ours; None: its weights are rounded, and nothing is held."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What `--dry-run` says: plain values, by name."""

    @abstractmethod
    def write(self, source: Source, place: Path) -> None:
        """Writes to a folder that is there and empty, or to a file.

        Raises:
            ValueError: tensors that are missing, or of another shape than the config says.
        """

    def read_back(self, place: Path, dtype: torch.dtype) -> Written | None:
        """Reads what was written.

        Args:
            place: where it is.
            dtype: of the arithmetic: fp32, or another one.

        Returns:
            What was written; None: it is not computed in this dtype, which is not fp32.
        """
        return None


class Limits(NamedTuple):
    """How far a right file is from ours, at most."""

    error: float
    """Largest mean of ||y' - y|| / ||y|| over the FFNs' outputs, where they choose alike; without a
    choice, of the whole model's logits."""
    sets: float = 0.0
    """Least share of token-layers that choose the same experts."""
    median: float = 0.5
    """Largest median of the errors of the whole model's logits. Half of each head not rotated
    gives 1.0, near ties that fall otherwise less than this."""
    worse: float = 0.1
    """How far the logarithm of its perplexity may be from ours."""
    decisions: float = 0.0
    """Least share of single decisions that are the same; of thousands of neurons, few sets are."""


Planner = Callable[[Source, Options], Plan]
"""Plans the export of a folder; refuses with a ValueError, in one line, what the format cannot say:
the reason and the way out."""
