"""Kernels run interpreted, or with -m gpu on a card; the interpreter as the tests need it."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Every test of this folder runs on either, but for those that look into the interpreter."""
    if item.get_closest_marker("interpreter") is None:
        item.add_marker("either")


@pytest.fixture(autouse=True)
def bf16_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies bf16 matrices, and makes bf16 of integers, by their bit
    patterns: go through fp32, which is exact."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        return
    builder = triton.runtime.interpreter.interpreter_builder
    bf16, fp32 = triton.language.bfloat16, triton.language.float32
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(handle: Any) -> Any:
        return cast(handle, fp32) if handle.dtype.scalar == bf16 else handle

    def widened_dot(a: Any, b: Any, *rest: Any) -> Any:
        return dot(widen(a), widen(b), *rest)

    def cast_integers(source: Any, dtype: Any) -> Any:
        if dtype.scalar == bf16 and source.dtype.scalar.is_int():
            source = cast(source, fp32)
        return cast(source, dtype)

    monkeypatch.setattr(builder, "create_dot", widened_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_integers)
