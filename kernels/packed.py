"""An FFN stored the way one backend reads it. Letters: T tokens, D model width, E experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights


class PackedFFN(ABC):
    """Packed once, called often; it does not follow later changes of the weights."""

    backend: ClassVar[str]

    def __init__(self, weights: FFNWeights) -> None:
        self.weights = weights
        """Views of what is stored."""

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.weights.up_FD.device

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: it never changes, and its numbers are most of a model."""
        return self

    def __call__(self, x_TD: Tensor, mask_TE: Tensor | None = None) -> Tensor:
        """y_TD, in the dtype of x; without a mask every neuron may run.

        Raises:
            ValueError: shapes that do not fit, or a gradient is asked for.
        """
        self.weights.check_call(x_TD, mask_TE)
        if x_TD.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "a packed FFN has no gradients: call it under torch.no_grad(), or use sparse_ffn"
            )
        return self._run(x_TD, mask_TE)

    @abstractmethod
    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        """y_TD from arguments that fit."""


class ReferenceFFN(PackedFFN):
    """The definition, on weights as they are."""

    backend = "reference"

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(x_TD.dtype)

        with torch.no_grad():
            return sparse_ffn_reference(self.weights.changed(cast, cast), x_TD, mask_TE)
