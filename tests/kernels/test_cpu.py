"""The native CPU backend against the reference in float64, on every instruction set of this CPU."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_tools.kernels.cpu.stored as backend
from moe_tools.bench.generate import threads
from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.limits import Limits, limits_for
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.cpu.rows import DTYPES
from moe_tools.kernels.few_bits import group_int8
from moe_tools.kernels.quantize import INT4, QUANTIZED, rounded
from moe_tools.kernels.reference import neuron_mask, sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights

ACTS = [
    Act("relu"),
    Act("relu2"),
    Act("fatrelu", 0.3),
    Act("shifted_relu", 0.2),
    Act("silu"),
    Act("gelu"),
    Act("gelu_tanh"),
]
# Of the output's dtype: half a unit in its last place, and the sums' own rounding.
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 4e-3, "atol": 2e-5},
    torch.float16: {"rtol": 5e-4, "atol": 2e-5},
}
# Where h is rounded to bf16, as a matrix product in bf16 does.
ROUNDED_H = {"rtol": 1e-2, "atol": 2e-2}
# Where h times a scale is, beside weights of four bits that are not scaled by their number.
ROUNDED_INT4 = {"rtol": 1e-2, "atol": 1e-1}
every_isa = pytest.mark.parametrize("isa", isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(
    neurons: int, width: int, act: Any = "silu", gated: bool = True, biases: str = "", **more: Any
) -> FFNWeights:
    """Random weights that keep h and y near 1; `biases` names those that are there."""

    def matrix() -> Tensor:
        return torch.randn(neurons, width) / width**0.5

    of_neurons = ("up_F", "gate_F", "off_F")
    tensors = {name: torch.randn(neurons) for name in of_neurons if name in biases}
    tensors |= {"down_D": torch.randn(width)} if "down_D" in biases else {}
    gate_FD = matrix() if gated else None
    return FFNWeights(matrix(), matrix(), act, gate_FD=gate_FD, **tensors, **more)


def exact(
    weights: FFNWeights, dtype: torch.dtype, x_TD: Tensor, mask_TE: Tensor | None = None
) -> Tensor:
    """The reference in float64, from weights as they are stored in `dtype`."""
    stored = rounded(weights, dtype)
    matrices = {name: getattr(stored, name) for name in ("up_FD", "down_FD", "gate_FD")}
    stored = replace(weights, **matrices)  # biases stay in fp32
    x_TD = group_int8(x_TD.float()) if dtype in QUANTIZED else x_TD
    double = stored.changed(Tensor.double, Tensor.double)
    return sparse_ffn_reference(double, x_TD.double(), mask_TE)


def rounds_h(dtype: torch.dtype, isa: str | None = None) -> bool:
    """Whether h is rounded to bf16 for weights of four bits."""
    return dtype == torch.int4 and (isa or isas()[-1]) == "avx512_bf16"


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    neurons = draw(st.integers(1, 90) | st.sampled_from([64, 65, 128, 200, 700]))
    gated = draw(st.booleans())
    names = ("up_F", "off_F", "down_D", *(["gate_F"] if gated else []))
    return {
        "neurons": neurons,
        "width": draw(st.integers(1, 70) | st.sampled_from([31, 32, 64, 65, 128, 513, 1100])),
        "experts": draw(st.integers(1, neurons) | st.just(neurons)),
        "leading": draw(
            st.sampled_from([(), (0,), (1,), (2,), (3, 1), (2, 3), (16,), (17,), (300,)])
        ),
        "gated": gated,
        "biases": " ".join(draw(st.sets(st.sampled_from(names)))),
        "act": draw(st.sampled_from(ACTS)),
        "up_act": draw(st.sampled_from(["identity", "relu"])) if gated else "identity",
        "dtype": draw(st.sampled_from(DTYPES)),
        "x_dtype": draw(st.sampled_from(DTYPES[:3])),
        "isa": draw(st.sampled_from(isas())),
        "threads": draw(st.integers(1, 5)),
        "few": draw(st.sampled_from([0, 4, 300])),
        "share": draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_output_equals_the_reference(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    parts = {name: case[name] for name in ("act", "gated", "biases", "up_act")}
    weights = make(case["neurons"], case["width"], **parts)
    x_TD = torch.randn(*case["leading"], case["width"]).to(case["x_dtype"])
    mask_TE = None
    if case["share"] is not None:
        mask_TE = torch.rand(*case["leading"], case["experts"]) < case["share"]
    packed = CpuFFN(weights, case["dtype"], or_dense=False, isa=case["isa"])
    limits = Limits(case["few"], 1.0, 1.0)
    with threads(case["threads"]), patch.object(backend, "limits_for", lambda *_: limits):
        y_TD = packed(x_TD, mask_TE)
    assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, x_TD.dtype)
    expected_TD = exact(weights, case["dtype"], x_TD, mask_TE)
    in_bf16 = case["dtype"] == case["x_dtype"] == torch.bfloat16 and limits.few < 300
    tolerance = ROUNDED_H if in_bf16 else TOLERANCES[case["x_dtype"]]
    if rounds_h(case["dtype"], case["isa"]):
        tolerance = ROUNDED_INT4
    torch.testing.assert_close(y_TD.double(), expected_TD, **tolerance)


@every_isa
@every_dtype
@pytest.mark.parametrize("tokens", [1, 5])
def test_one_expert_at_a_time_adds_up_to_the_dense_ffn(
    isa: str, dtype: torch.dtype, tokens: int
) -> None:
    weights, x_TD = make(45, 50), torch.randn(tokens, 50)  # 7 experts: 3 of seven, 4 of six neurons
    packed = CpuFFN(weights, dtype, or_dense=False, isa=isa)
    parts = [packed(x_TD, torch.eye(7, dtype=torch.bool)[e].expand(tokens, 7)) for e in range(7)]
    expected_TD = exact(weights, dtype, x_TD).float()
    tolerance = ROUNDED_H if rounds_h(dtype, isa) else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(torch.stack(parts).sum(0), expected_TD, **tolerance)


@every_isa
@every_dtype
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("gated", [True, False])
def test_neurons_that_are_fetched_whole_add_up(
    isa: str, dtype: torch.dtype, tokens: int, gated: bool
) -> None:
    """Few neurons, a block of them, one more: what is fetched ahead ends where the rows end."""
    for neurons in (1, 3, 63, 64, 65, 128, 129):
        for act in ("silu", "gelu", "identity"):
            weights, x_TD = make(neurons, 50, act=act, gated=gated), torch.randn(tokens, 50)
            packed = CpuFFN(weights, dtype, or_dense=False, isa=isa)
            with patch.object(backend, "limits_for", lambda *_: Limits(16, 1.0, 1.0)):
                for mask_TE in (None, torch.rand(tokens, neurons) < 0.3):
                    expected_TD = exact(weights, dtype, x_TD, mask_TE).float()
                    tolerance = TOLERANCES[torch.float32]
                    if rounds_h(dtype, isa):
                        tolerance = ROUNDED_INT4
                    torch.testing.assert_close(packed(x_TD, mask_TE), expected_TD, **tolerance)


@every_isa
@every_dtype
@pytest.mark.parametrize("x_dtype", DTYPES[:3], ids=str)
def test_infinities_and_tiny_numbers_survive(
    isa: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    numbers = [1.0, -2.0, 65504.0, 6e-8, -3e-5, 0.0]
    if dtype not in QUANTIZED:
        numbers += [float("inf"), -float("inf"), float("nan")]
    down_FD = torch.tensor([numbers])
    width = len(numbers)
    weights = FFNWeights(torch.ones(1, width), down_FD, "identity")
    x_TD = torch.eye(width, dtype=x_dtype)[:1]  # h = 1
    y_TD = CpuFFN(weights, dtype, or_dense=False, isa=isa)(x_TD)
    expected_TD = rounded(weights, dtype).down_FD.to(x_dtype)
    if dtype in QUANTIZED:
        expected_TD = exact(weights, dtype, x_TD).to(x_dtype)  # the ones above are rounded, too
        torch.testing.assert_close(y_TD, expected_TD, rtol=1e-6, atol=0.0)
    else:
        assert torch.equal(y_TD.nan_to_num(nan=7.0), expected_TD.nan_to_num(nan=7.0))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_run_gives_the_same_numbers_every_time(tokens: int) -> None:
    weights, x_TD = make(3000, 96), torch.randn(tokens, 96)
    mask_TE = torch.rand(tokens, 1500) < 0.5
    packed = CpuFFN(weights, torch.bfloat16, or_dense=False)
    for count in (1, 2, 3, 7):
        with threads(count):
            first_TD = packed(x_TD, mask_TE)
            assert all(torch.equal(packed(x_TD, mask_TE), first_TD) for _ in range(30))


def test_calls_from_several_threads_do_not_meet() -> None:
    weights, x_TD = make(500, 64), torch.randn(8, 1, 64)
    packed = CpuFFN(weights, torch.float32)
    expected = [packed(x_1D) for x_1D in x_TD]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(packed(x_TD[index]), expected[index]):
                wrong.append(index)

    team = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for one in team:
        one.start()
    for one in team:
        one.join()
    assert not wrong


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_only_rows_of_experts_that_are_on_are_read(gated: bool, tokens: int) -> None:
    weights, x_TD = make(103, 20, gated=gated), torch.randn(tokens, 20)
    mask_TE = torch.rand(tokens, 10) < 0.3
    union = int(neuron_mask(mask_TE.any(0, keepdim=True), 103).sum())
    packed = CpuFFN(weights, torch.float32)
    assert packed.rows_read(x_TD, mask_TE) == (3 if gated else 2) * union
    assert packed.rows_read(x_TD, torch.zeros(tokens, 10, dtype=torch.bool)) == 0


@pytest.mark.parametrize("up_act", ["identity", "relu"])
def test_behind_a_gate_that_is_zero_nothing_is_read(up_act: Any) -> None:
    weights = make(1000, 30, act=Act("fatrelu", 0.5), up_act=up_act)
    x_TD = torch.randn(1, 30)
    gate_TF, up_TF = x_TD @ weights.gate_FD.T, x_TD @ weights.up_FD.T
    open_TF = gate_TF >= 0.5
    last_TF = open_TF & (up_TF > 0) if up_act == "relu" else open_TF
    expected = 1000 + int(open_TF.sum()) + int(last_TF.sum())
    assert CpuFFN(weights, torch.float32).rows_read(x_TD) == expected


def test_of_an_expert_that_is_off_not_even_infinity_counts() -> None:
    weights = make(6, 4)
    for matrix_FD in (weights.up_FD, weights.down_FD, weights.gate_FD):
        matrix_FD[3:] = float("nan")
    mask_TE = torch.tensor([[True, False]])
    packed = CpuFFN(weights, torch.float32)
    assert packed(torch.randn(1, 4), mask_TE).isfinite().all()


def test_later_changes_of_the_weights_are_not_followed() -> None:
    weights, x_TD = make(8, 4, biases="up_F gate_F down_D"), torch.randn(1, 4)
    packed = CpuFFN(weights, torch.float32)
    before_TD = packed(x_TD)
    for tensor in (weights.up_FD, weights.down_FD, weights.gate_FD, weights.up_F, weights.down_D):
        tensor.zero_()
    assert torch.equal(packed(x_TD), before_TD)


def test_x_and_mask_may_be_views() -> None:
    weights, x_TD = make(30, 16), torch.randn(16, 3).T
    mask_TE = (torch.rand(10, 1) < 0.5).expand(10, 3).T
    packed = CpuFFN(weights, torch.float32, or_dense=False)
    assert torch.equal(packed(x_TD, mask_TE), packed(x_TD.contiguous(), mask_TE.contiguous()))


@every_dtype
@pytest.mark.parametrize(
    ("tokens", "mask"), [(17, "few"), (5, "all"), (16, "none"), (1, "soft"), (3, "soft")]
)
def test_where_dense_is_faster_the_output_is_the_same(
    dtype: torch.dtype, tokens: int, mask: str
) -> None:
    weights, x_TD = make(30, 16, biases="up_F gate_F off_F down_D"), torch.randn(tokens, 16)
    masks_TE = {
        "few": torch.arange(10).expand(tokens, 10) < 2,
        "all": torch.ones(tokens, 10, dtype=torch.bool),
        "soft": torch.rand(tokens, 10),
        "none": None,
    }
    mask_TE = masks_TE[mask]
    y_TD = CpuFFN(weights, dtype)(x_TD, mask_TE)
    expected_TD = exact(weights, dtype, x_TD, mask_TE).float()
    tolerance = ROUNDED_H if rounds_h(dtype) else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(y_TD, expected_TD, **tolerance)


@pytest.mark.parametrize(
    ("tokens", "width", "on", "dense"),
    [
        (1, 64, 10, False),
        (8, 64, 10, False),
        (9, 64, 5, False),
        (9, 64, 6, True),
        (16, 1024, 10, False),
        (17, 1024, 6, False),
        (17, 1024, 7, True),
        (65, 1024, 4, False),
        (65, 1024, 5, True),
    ],
)
def test_tokens_and_what_they_want_decide_what_is_dense(
    tokens: int, width: int, on: int, dense: bool
) -> None:
    """In bf16 matrix products round z, the kernels do not: the outputs tell which of them ran."""
    weights, x_TD = make(320, width), torch.randn(tokens, width).bfloat16()
    weights = rounded(weights, torch.bfloat16)
    mask_TE = torch.arange(10).expand(tokens, 10) < on
    expected_TD = sparse_ffn_reference(weights, x_TD, mask_TE)
    y_TD = CpuFFN(weights, torch.bfloat16)(x_TD, mask_TE)
    assert torch.equal(y_TD, expected_TD) == dense


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES[:3], ids=str)
def test_only_products_of_bf16_are_faster(weights: torch.dtype, x: torch.dtype) -> None:
    """Of many tokens with codes, too, which are made bf16 for that."""
    for tokens in (1, 16, 17, 65, 512):
        limits = limits_for(weights, x, tokens, 2048)
        assert limits.few == 8 and limits.most_few == 1.0
        from_on = 64 if weights in (torch.int8, INT4) else 16
        known = weights in (torch.bfloat16, torch.int8, INT4) and x == torch.bfloat16
        assert (limits.most_many < 1.0) == (known and tokens > from_on)


@pytest.mark.parametrize("method", ["__call__", "rows_read"])
def test_a_mask_of_weights_needs_the_dense_path(method: str) -> None:
    packed = CpuFFN(make(30, 16), torch.float32, or_dense=False)
    with pytest.raises(ValueError, match=r"^backend 'cpu' runs experts or not: give a boolean"):
        getattr(packed, method)(torch.randn(1, 16), torch.rand(1, 10))


def test_a_gradient_is_refused() -> None:
    packed = CpuFFN(make(30, 16), torch.float32)
    with pytest.raises(ValueError, match=r"^a packed FFN has no gradients: call it under"):
        packed(torch.randn(1, 16, requires_grad=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, r"^backend 'cpu' stores fp32, bf16, fp16, int8 and int4, not"),
        ({"isa": "mmx"}, r"^unknown instruction set 'mmx'; this CPU runs: portable"),
        ({"act": torch.tanh}, r"^backend 'cpu' knows activations by name: give a name or an Act"),
        ({"up_act": torch.tanh}, r"^backend 'cpu' knows activations by name"),
    ],
    ids=["dtype", "isa", "act", "up_act"],
)
def test_what_it_cannot_do_is_said(options: dict[str, Any], message: str) -> None:
    weights = make(6, 4, **{k: v for k, v in options.items() if k in ("act", "up_act")})
    with pytest.raises(ValueError, match=message):
        CpuFFN(weights, options.get("dtype", torch.float32), isa=options.get("isa"))


@pytest.mark.parametrize("tokens", [1, 20])
def test_inputs_of_another_kind_are_named(tokens: int) -> None:
    packed, x_TD = CpuFFN(make(6, 4), torch.float32), torch.randn(tokens, 4)
    with pytest.raises(ValueError, match=r"^x_TD is torch.float64 on cpu: backend 'cpu' takes"):
        packed(x_TD.double())
    with pytest.raises(ValueError, match=r"^x_TD is torch.float32 on meta: backend 'cpu' takes"):
        packed(x_TD.to("meta"))
    with pytest.raises(ValueError, match=r"^mask_TE is on meta: backend 'cpu' takes it on the"):
        packed(x_TD, torch.ones(tokens, 2, dtype=torch.bool, device="meta"))
