"""The compiled extension: that it is there, and what happens where it is not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moe_tools.kernels.cpu
from moe_tools.kernels.cpu.native import extension, isa_index, isas
from moe_tools.kernels.packed import ReferenceFFN
from moe_tools.kernels.quantize import QUANTIZED
from moe_tools.kernels.sparse_ffn import announce, backends, native_cpu, pack, sparse_ffn
from moe_tools.kernels.weights import FFNWeights

ORDER = ["portable", "avx2", "avx_vnni", "avx512", "avx512_bf16", "dotprod"]


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


def test_its_instruction_sets_come_in_order() -> None:
    """A CPU may lack one and have what comes behind it."""
    assert isas() == [isa for isa in ORDER if isa in isas()]
    assert isas()[0] == "portable"
    places = [isa_index(isa) for isa in isas()]
    assert places == sorted(places) and isa_index(None) == places[-1]


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


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_without_it_few_bits_are_refused_unless_rounding_is_asked_for(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=rf"^no kernel reads {dtype} here, .* \(the native CPU"):
        pack(weights(), dtype=dtype)
    assert not caplog.records  # nothing runs on PyTorch alone
    assert pack(weights(), dtype=dtype, backend="reference").backend == "reference"


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_so_they_are_where_the_kernels_do_not_know_the_activation(dtype: torch.dtype) -> None:
    made = FFNWeights(torch.randn(6, 4), torch.randn(6, 4), torch.tanh)
    with pytest.raises(ValueError, match=r"\(backend 'cpu' knows activations by name: give a name"):
        pack(made, dtype=dtype)


# --- the arguments of the compiled module ---------------------------------------------------------


def prepare_arguments() -> dict[str, Any]:
    """Of an FFN of no neurons: nothing is read."""
    tensors = ("rows_FPB", "biases_FP", "off_F", "down_D")
    screen = ("screen_FB", "screen_scale_F", "screen_error_F")
    numbers = ("neurons", "width", "lines", "gated", "dtype", "act", "up_act", "isa")
    zeros = dict.fromkeys((*tensors, *screen, *numbers), 0)
    return zeros | {"threshold": 0.0, "up_threshold": 0.0, "screen_reach": 1.0}


def run_arguments(y_TD: torch.Tensor) -> dict[str, Any]:
    """Of no tokens."""
    address = y_TD.data_ptr()
    tensors = {"x_TD": address, "y_TD": address, "mask_TE": 0}
    limits = {"few": 8, "most_few": 1.0, "most_many": 1.0}
    return {"threads": 1, "dtype": 0, "tokens": 0, "experts": 1, **tensors, **limits}


@pytest.mark.parametrize("order", [1, -1])
def test_arguments_have_names_and_no_order(order: int) -> None:
    native, y_TD = extension(), torch.zeros(1)
    handle = native.prepare(**dict(list(prepare_arguments().items())[::order]))
    assert native.run(handle, **dict(list(run_arguments(y_TD).items())[::order])) == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"width": None}, TypeError, "^width is missing$"),
        ({"theta": 0.1}, TypeError, "^nobody knows 'theta'$"),
        ({f"more_{i}": 0 for i in range(70)}, TypeError, "^nobody knows 'more_0'$"),
        ({"dtype": 5}, ValueError, "^dtype is 5: codes go from 0 to 4$"),
        ({"act": -1}, ValueError, "^act is -1: codes go from 0 to 7$"),
        ({"isa": 9}, ValueError, "^isa is 9: codes go from 0 to "),
        ({"lines": 1.5}, TypeError, "float"),
        ({"rows_FPB": "x"}, TypeError, "str|integer"),
    ],
    ids=lambda value: "-".join(value)[:20] if isinstance(value, dict) else None,
)
def test_wrong_arguments_of_prepare_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {k: v for k, v in (prepare_arguments() | changes).items() if v is not None}
    with pytest.raises(error, match=message):
        extension().prepare(**arguments)
    with pytest.raises(TypeError, match=r"^give every argument by its name$"):
        extension().prepare(0, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y_TD": None}, TypeError, "^y_TD is missing$"),
        ({"most": 1.0}, TypeError, "^nobody knows 'most'$"),
        ({"dtype": 3}, ValueError, "^dtype is 3: codes go from 0 to 2$"),
    ],
)
def test_wrong_arguments_of_run_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    native, y_TD = extension(), torch.zeros(1)
    handle = native.prepare(**prepare_arguments())
    arguments = {k: v for k, v in (run_arguments(y_TD) | changes).items() if v is not None}
    with pytest.raises(error, match=message):
        native.run(handle, **arguments)
    with pytest.raises(TypeError, match=r"^give the FFN, then names$"):
        native.run(handle, 1, **arguments)
