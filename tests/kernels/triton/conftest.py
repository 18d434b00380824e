"""The interpreter as the tests need it."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies the bit patterns of bf16 matrices: widen them first."""
    triton = pytest.importorskip("triton")
    builder = triton.runtime.interpreter.interpreter_builder
    dot = builder.create_dot

    def widen(handle: Any) -> Any:
        bf16 = handle.dtype.scalar == triton.language.bfloat16
        return builder.cast_impl(handle, triton.language.float32) if bf16 else handle

    def widened_dot(a: Any, b: Any, *rest: Any) -> Any:
        return dot(widen(a), widen(b), *rest)

    monkeypatch.setattr(builder, "create_dot", widened_dot)
