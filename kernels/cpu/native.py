"""Loads the compiled kernels of csrc/, or says why they are not there."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def extension() -> ModuleType:
    """Imports the compiled module, `_sparse_ffn`; nothing else does.

    Raises:
        ValueError: it was not built, or does not load.
    """
    try:
        # torch first: the extension then finds torch's OpenMP and shares its threads
        import torch  # noqa: F401

        from moe_tools.kernels.cpu import _sparse_ffn
    except ImportError as error:
        raise ValueError(
            f"the native CPU kernels are not there ({error}): reinstall moe-tools where a C++17 "
            "compiler is, or use backend='reference'"
        ) from error
    return _sparse_ffn


def isas() -> list[str]:
    """Returns the instruction sets that the kernels have and this CPU runs, the fastest last.

    Raises:
        ValueError: as `extension`.
    """
    return list(_places())


def isa_index(isa: str | None) -> int:
    """Returns the place of an instruction set among all; None is the fastest that runs.

    Raises:
        ValueError: this CPU does not run it, or as `extension`.
    """
    places = _places()
    isa = list(places)[-1] if isa is None else isa
    if isa not in places:
        raise ValueError(f"unknown instruction set {isa!r}; this CPU runs: {', '.join(places)}")
    return places[isa]


def _places() -> dict[str, int]:
    places: dict[str, int] = extension().isas()
    return places


def address(tensor: Tensor | None) -> int:
    """Returns where a tensor's numbers begin; 0 stands for none."""
    return 0 if tensor is None else tensor.data_ptr()
