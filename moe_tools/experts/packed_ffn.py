"""What becomes of a module whose weights were packed: it stays on its device, in its format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from moe_tools.hosts.ffn import FFN, GraftedFFN
from moe_tools.kernels.packed import PackedFFN


class PackableFFN(GraftedFFN):
    """Computes through `packed` once that is there; its linears then hold names and shapes alone.

    A deep copy shares what is packed, which never changes. `to(dtype)` reaches all but the packed
    numbers.
    """

    def __init__(self, ffn: FFN) -> None:
        super().__init__(ffn)
        self.packed: PackedFFN | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts every tensor, as `to` and its kin do.

        Raises:
            ValueError: packed weights would have to go to another device.
        """
        packed = self.packed
        if packed is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        here = packed.device
        there = fn(torch.empty(0, device=here)).device
        if there != here:
            raise ValueError(
                f"{self.name} is packed for {here} and cannot go to {there}: load the model again "
                "there, then optimise it"
            )

        def cast(tensor: Tensor) -> Tensor:
            return _cast(tensor, fn, here) if tensor.is_meta else fn(tensor)

        return super()._apply(cast, recurse)  # type: ignore[no-untyped-call]


def _cast(tensor: Tensor, fn: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """A tensor without numbers, in the dtype that `fn` would give it."""
    return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=device)).dtype)
