"""One launch of a kernel, as data: built from shapes, then run, compiled or counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel, its grid and every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int = 2
    """Steps of a loop in flight at once."""

    @property
    def name(self) -> str:
        """The name of the kernel's function."""
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told. FP fusion is said because its default is to change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Puts the kernel on the device's queue and returns at once."""
        self.kernel[self.grid](**self.arguments, **self.options)


def row_stride(weight_FD: Tensor | None) -> int:
    """How many elements lie between the starts of two neighbouring rows; 0 without a weight."""
    return 0 if weight_FD is None else weight_FD.stride(-2)
