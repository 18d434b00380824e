"""Packed FFNs: stored in the form that one backend reads.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moe_tools.kernels.few_bits import group_int8
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.scores import Scores
from moe_tools.kernels.weights import FFNWeights


class PackedFFN(ABC):
    """An FFN that is packed once and called often. It does not follow changes of the weights."""

    backend: ClassVar[str]
    adds: ClassVar[bool] = False
    """Whether it adds a residual in the pass that writes y."""
    selects: ClassVar[bool] = False
    """Whether it can find for itself which experts run (`scored`)."""

    def __init__(self, weights: FFNWeights) -> None:
        self.weights = weights
        """Views of the stored numbers."""

    @property
    def device(self) -> torch.device:
        """The device that holds the stored numbers."""
        return self.weights.up_FD.device

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns the FFN itself: it never changes, and its numbers are most of a model."""
        return self

    def __call__(
        self, x_TD: Tensor, mask_TE: Tensor | None = None, residual_TD: Tensor | None = None
    ) -> Tensor:
        """Computes y_TD, in the dtype of x; without a mask every neuron may run.

        Args:
            x_TD: any leading dimensions.
            mask_TE: which experts run.
            residual_TD: is added to y; of the shape and dtype of x.

        Raises:
            ValueError: shapes that do not fit, or a gradient is asked for.
        """
        self.check_call(x_TD, mask_TE, residual_TD)
        return self._run_onto(x_TD, mask_TE, residual_TD)

    def check_call(self, x_TD: Tensor, mask_TE: Tensor | None, residual_TD: Tensor | None) -> None:
        """Checks that a call can be computed.

        Raises:
            ValueError: shapes that do not fit, a residual that is not like x, or a gradient is
                asked for.
        """
        self.weights.check_call(x_TD, mask_TE)
        asks = [x_TD] if residual_TD is None else [x_TD, residual_TD]
        if torch.is_grad_enabled() and any(one.requires_grad for one in asks):
            raise ValueError(
                "a packed FFN has no gradients: call it under torch.no_grad(), or use sparse_ffn"
            )
        if residual_TD is not None and not is_like(residual_TD, x_TD):
            raise ValueError(
                f"residual_TD is {tuple(residual_TD.shape)} in {residual_TD.dtype}, but must be as "
                f"x_TD, {tuple(x_TD.shape)} in {x_TD.dtype}"
            )

    def takes(self, x_TD: Tensor, scores: Scores) -> bool:
        """Whether `scored` can compute this, and is expected to be the fastest way."""
        return False

    def scored(self, x_TD: Tensor, scores: Scores, residual_TD: Tensor | None = None) -> Tensor:
        """Computes y_TD of the experts that `scores` select, where `takes` says so.

        Raises:
            ValueError: it does not.
        """
        raise ValueError(f"backend {self.backend!r} takes a mask, no scores")

    def _run_onto(self, x_TD: Tensor, mask_TE: Tensor | None, residual_TD: Tensor | None) -> Tensor:
        """Computes y_TD and adds the residual, if there is one."""
        y_TD = self._run(x_TD, mask_TE)
        return y_TD if residual_TD is None else residual_TD + y_TD

    @abstractmethod
    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        """Computes y_TD from arguments that fit."""


def checked_share(share: float) -> float:
    """Returns a share of the neurons.

    Raises:
        ValueError: it is none.
    """
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1:
        raise ValueError(f"share is {share!r}, but must be in (0, 1]: of the neurons of a token")
    return float(share)


def is_like(residual_TD: Tensor, x_TD: Tensor) -> bool:
    """Whether a residual has the shape and the dtype of x, so that y can be added in one pass."""
    return residual_TD.shape == x_TD.shape and residual_TD.dtype == x_TD.dtype


class ReferenceFFN(PackedFFN):
    """Computes what the reference defines, on the weights as they are given.

    Args:
        weights: not copied.
        integers: round x to int8 in groups of 32, as the native kernels do where the weights are
            int8 or int4.
    """

    backend = "reference"

    def __init__(self, weights: FFNWeights, *, integers: bool = False) -> None:
        super().__init__(weights.changed(Tensor.detach, Tensor.detach))
        self._integers = integers

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(x_TD.dtype)

        with torch.no_grad():
            x_TD = group_int8(x_TD) if self._integers else x_TD
            return sparse_ffn_reference(self.weights.changed(cast, cast), x_TD, mask_TE)
