"""The compiled extension: that it is there, and what happens where it is not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch

import moe_tools.kernels.cpu
from moe_tools.kernels.cpu.native import extension, isas
from moe_tools.kernels.packed import ReferenceFFN
from moe_tools.kernels.sparse_ffn import announce, backends, native_cpu, pack, sparse_ffn
from moe_tools.kernels.weights import FFNWeights

ORDER = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an install without a compiler."""
    monkeypatch.delattr(moe_tools.kernels.cpu, "_sparse_ffn", raising=False)
    monkeypatch.setitem(sys.modules, "moe_tools.kernels.cpu._sparse_ffn", None)
    native_cpu.cache_clear()
    yield
    native_cpu.cache_clear()


def weights() -> FFNWeights:
    return FFNWeights(torch.randn(6, 4), torch.randn(6, 4), "silu", torch.randn(6, 4))


def test_it_was_built() -> None:
    """An optional extension swallows the compiler's errors: this is where they show."""
    extension()


def test_its_instruction_sets_build_on_each_other() -> None:
    assert isas() == ORDER[: len(isas())]


def test_its_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    announce.cache_clear()
    with caplog.at_level(logging.INFO, "moe_tools.kernels"):
        assert backends()[0] == "cpu"
        assert not caplog.records  # who only asks what there is hears nothing
        assert pack(weights()).backend == pack(weights()).backend == "cpu"
    (record,) = caplog.records
    assert record.getMessage() == f"sparse_ffn runs on native CPU kernels, {isas()[-1]}"


@pytest.mark.usefixtures("missing")
def test_without_it_the_reference_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    packed = [pack(weights()), pack(weights())]
    assert all(isinstance(one, ReferenceFFN) for one in packed)
    assert "cpu" not in backends() and backends()[-1] == "reference"  # a GPU may stand between
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "reinstall moe-tools where a C++17 compiler is" in record.getMessage()


@pytest.mark.usefixtures("missing")
def test_without_it_a_backend_that_was_named_is_an_error() -> None:
    made = weights()
    with pytest.raises(
        ValueError, match=r"^the native CPU kernels are not there \(.*\): reinstall"
    ):
        pack(made, backend="cpu")
    with pytest.raises(ValueError, match=r"^the native CPU kernels are not there"):
        sparse_ffn(torch.randn(1, 4), made.up_FD, made.down_FD, act="silu", backend="cpu")
