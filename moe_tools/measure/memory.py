"""Predicts the memory that parameters take in training, on each of several processes under ZeRO.

ZeRO (arXiv 1910.02054, section 3): a parameter that is trained in bf16 costs 2 bytes, its gradient
2, and Adam 12: an fp32 master and two fp32 moments. Stage 1 divides Adam's part over the processes,
stage 2 the gradients too, stage 3 the weights too. Activations, logits, buffers of communication
and what an allocator wastes come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

STAGES = (0, 1, 2, 3)
"""Stages of ZeRO; 0 divides nothing."""
MOMENTS = 8
"""Bytes of Adam's two fp32 moments of one parameter."""
MASTER = 4
"""Bytes of an fp32 copy, which a parameter of fewer bits needs."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes that all processes together have to hold at least once."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    """Weights of the donor, where a loss needs it: every process holds all of them."""
    teacher_sharded: bool = False
    """Whether they are divided as well, which takes stage 3."""

    @classmethod
    def of(
        cls,
        parameters: Iterable[nn.Parameter],
        trained: Iterable[nn.Parameter] = (),
        teacher: int = 0,
    ) -> Self:
        """The states of a model, some parameters of which are trained with Adam."""
        trained = list(trained)
        return cls(
            weights=size(parameters),
            gradients=size(trained),
            optimizer=sum(one.numel() * _adam(one.dtype) for one in trained),
            teacher=teacher,
        )

    def per_process(self, stage: int, processes: int) -> float:
        """Bytes of one process under a stage of ZeRO.

        Raises:
            ValueError: no such stage, or fewer than one process.
        """
        if stage not in STAGES:
            raise ValueError(f"ZeRO has the stages 0, 1, 2 and 3, not {stage}")
        if processes < 1:
            raise ValueError(f"{processes} processes hold nothing: give at least 1")
        divided = (self.optimizer, self.gradients, self.weights)
        shared = processes if self.teacher_sharded and stage == 3 else 1
        return self.teacher / shared + sum(
            part / processes if stage > index else part for index, part in enumerate(divided)
        )


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters as they are."""
    return sum(one.numel() * one.element_size() for one in parameters)


def _adam(dtype: torch.dtype) -> int:
    return MOMENTS + (0 if dtype == torch.float32 else MASTER)
