"""Predicts the memory that parameters take in training, on each of several processes under ZeRO.

ZeRO (arXiv 1910.02054, section 3): a parameter that is trained in bf16 costs 2 bytes, its gradient
2, and Adam 12: an fp32 master and two fp32 moments. Stage 1 divides Adam's part over the processes,
stage 2 the gradients too, stage 3 the weights too. Where several passes make one optimizer step,
gradients of bf16 weights are added in fp32, 4 bytes more (docs/training.md has the table).
Offloaded, Adam's part and a gradient in fp32 are in the memory of the host, and under stage 3 the
weights; a stage 3 has besides the weights of one layer whole, while that computes.

Activations and logits are `moe_tools.measure.activations`. Buffers of communication and what an
allocator wastes come on top.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import nn

STAGES = (0, 1, 2, 3)
"""Stages of ZeRO; 0 divides nothing."""
MOMENTS = 8
"""Bytes of Adam's two fp32 moments of one parameter."""
MASTER = 4
"""Bytes of an fp32 copy, which a parameter of fewer bits needs."""

Teacher = Literal["whole", "sharded", "offloaded", "cached"]
"""Where a teacher is. whole: on the device of every process. sharded: in shards over the processes,
under ZeRO-3, read layer by layer. offloaded: in the memory of the CPU, from where each layer comes
to the GPU for its forward pass; without a GPU it is whole. cached: nowhere; its most likely tokens
are on the disk."""


@dataclass(frozen=True)
class Way:
    """How states are divided, and what of them leaves the card."""

    stage: int
    offloaded: bool = False
    """Adam's part, and under stage 3 the weights, are in the memory of the host."""


WAYS = {
    "0": Way(0),
    "1": Way(1),
    "2": Way(2),
    "2_offload": Way(2, offloaded=True),
    "3": Way(3),
    "3_offload": Way(3, offloaded=True),
}
"""As `recipes/deepspeed` has them; `0` of bf16 weights is PyTorch alone."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes that all processes together have to hold at least once."""

    weights: int
    gradients: int = 0
    """Of one pass."""
    optimizer: int = 0
    teacher: int = 0
    """Weights of the donor, where a loss needs it."""
    sums: int = 0
    """fp32 sums of the gradients of several passes."""
    numbers: int = 0
    """Parameters that are trained; no bytes."""
    layer: int = 0
    """Weights of the largest layer; a part of `weights`."""

    @classmethod
    def of(
        cls,
        parameters: Iterable[nn.Parameter],
        trained: Iterable[nn.Parameter] = (),
        teacher: int = 0,
        *,
        summed: bool = False,
        layer: int = 0,
    ) -> Self:
        """The states of a model, some parameters of which are trained with Adam.

        `summed` where several passes make one optimizer step.
        """
        trained = list(trained)
        low = [one for one in trained if one.dtype != torch.float32]
        return cls(
            weights=size(parameters),
            gradients=size(trained),
            optimizer=sum(one.numel() * _adam(one.dtype) for one in trained),
            teacher=teacher,
            sums=MASTER * sum(one.numel() for one in trained) if summed and low else 0,
            numbers=sum(one.numel() for one in trained),
            layer=layer,
        )

    def per_process(
        self,
        stage: int,
        processes: int,
        teacher: Teacher = "whole",
        *,
        offloaded: bool = False,
    ) -> float:
        """Bytes of one process, on its card.

        Raises:
            ValueError: no such stage, or fewer than one process.
        """
        check_stage(stage, processes)
        adam = 0.0 if offloaded else self.optimizer / (processes if stage > 0 else 1)
        weights = float(self.weights)
        if stage == 3:
            shared = 0.0 if offloaded else weights / processes
            weights = min(weights, shared + self.layer)
        return (
            weights
            + adam
            + self._gradients(stage, processes, offloaded)
            + {
                "whole": self.teacher,
                "sharded": self.teacher / processes,
                "offloaded": 0.0,
                "cached": 0.0,
            }[teacher]
        )

    def _gradients(self, stage: int, processes: int, offloaded: bool) -> float:
        if stage < 2:
            own = 0 if stage == 0 and self.sums else self.gradients
            return own + self.sums
        return 0.0 if offloaded else (self.sums or self.gradients) / processes

    def per_host(
        self, way: Way, processes: int, on_host: int, teacher: Teacher = "whole", *, born: bool
    ) -> float:
        """Bytes in the memory of a host with `on_host` of the processes.

        Either while models are loaded or while they train, whichever needs more. DeepSpeed takes a
        model from the memory of the host, where every process has loaded all of it; PyTorch alone
        (stage 0) reads it to the card.

        Args:
            way: of ZeRO.
            processes: all of them.
            on_host: those of this host.
            teacher: where it is.
            born: a stage 3 reads every weight to its shards, once a host.
        """
        copies = 1 if born and way.stage == 3 else on_host
        whole = self.teacher if teacher in ("whole", "sharded", "offloaded") else 0
        loading = 0.0 if way.stage == 0 else copies * (self.weights + whole)
        training = 0.0
        if way.offloaded:
            training += (self.optimizer + MASTER * self.numbers) / processes * on_host
            if way.stage == 3:
                training += self.weights / processes * on_host
        if teacher == "offloaded":
            training += self.teacher
        return max(loading, training)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint inside a train step: weights, fp32 masters, moments."""
        return self.weights + self.optimizer


def check_stage(stage: int, processes: int) -> None:
    """Checks both.

    Raises:
        ValueError: no such stage, or fewer than one process.
    """
    if stage not in STAGES:
        raise ValueError(f"ZeRO has the stages 0, 1, 2 and 3, not {stage}")
    if processes < 1:
        raise ValueError(f"{processes} processes hold nothing: give at least 1")


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters as they are."""
    return sum(one.numel() * one.element_size() for one in parameters)


def largest_layer(model: nn.Module) -> int:
    """Bytes of the largest layer, or of a tensor outside the layers, if that is larger."""
    layers: defaultdict[str, int] = defaultdict(int)
    for name, param in model.named_parameters():
        layer = re.match(r".*?\.\d+\.", name)
        layers[layer[0] if layer else name] += size([param])
    return max(layers.values(), default=0)


def _adam(dtype: torch.dtype) -> int:
    return MOMENTS + (0 if dtype == torch.float32 else MASTER)
