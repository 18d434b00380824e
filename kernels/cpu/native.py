"""Loads the compiled kernels of csrc/, or says why they are not there."""

from __future__ import annotations

from types import ModuleType


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
    names: list[str] = extension().isas()
    return names
