"""Packed FFNs: floats and few bits, what is off, residuals, and choices of their own."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.kernels import sparse_ffn as kernels
from moe_tools.kernels.activations import Act, named
from moe_tools.kernels.few_bits import copy_rows, store_rows
from moe_tools.kernels.quantize import INT4, rounded
from moe_tools.kernels.reference import neuron_mask, sparse_ffn_reference
from moe_tools.kernels.scores import FewBitScores, LinearScores, Scores
from moe_tools.kernels.sparse_ffn import pack, sparse_ffn
from moe_tools.kernels.weights import FFNWeights

pytest.importorskip("triton")

from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.kernel_launch import KernelLaunch
from moe_tools.kernels.triton.packed import TritonFFN
from moe_tools.kernels.triton.stored import of_codes, store
from tests.host_reads import NoHostReads
from tools.traffic import count_loads

TINY = Config(16, 16, 4, 16, 8, 16, 2, 4)
WIDTH, EXPERTS, NEURONS = 41, 7, 45
BITS = {torch.int8: 8, INT4: 4}
few_bits = pytest.mark.parametrize("dtype", BITS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *BITS], ids=str)
tokens_one_or_more = pytest.mark.parametrize("tokens", [1, 5])
gated_or_not = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def make(
    act: str | Act = "silu", up_act: str = "identity", *, gated: bool = True, off: bool = False
) -> FFNWeights:
    """Rows whose sizes differ a lot, as their scales then do."""
    sizes_F1 = torch.logspace(-3, 1, NEURONS)[torch.randperm(NEURONS), None]
    up_FD, down_FD, gate_FD = (torch.randn(NEURONS, WIDTH) for _ in range(3))
    return FFNWeights(
        up_FD,
        down_FD * sizes_F1,
        act,
        gate_FD if gated else None,
        up_F=torch.randn(NEURONS),
        gate_F=torch.randn(NEURONS) if gated else None,
        down_D=torch.randn(WIDTH),
        up_act=up_act if gated else "identity",
        off_F=torch.randn(NEURONS) if off else None,
    )


def assert_close(y_TD: Tensor, expected_TD: Tensor, tolerance: float = 1e-5) -> None:
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD, rtol=tolerance, atol=tolerance * largest)


@tokens_one_or_more
@gated_or_not
@every_dtype
@pytest.mark.parametrize("act", ["silu", "relu", Act("fatrelu", 0.5)], ids=str)
@pytest.mark.parametrize("mask", ["soft", "hard", "none"])
def test_y_is_that_of_the_stored_numbers(
    act: str | Act, dtype: torch.dtype, gated: bool, tokens: int, mask: str
) -> None:
    weights, x_TD = make(act, gated=gated), torch.randn(tokens, WIDTH)
    soft_TE = torch.rand(tokens, EXPERTS)
    mask_TE = {"soft": soft_TE, "hard": soft_TE < 0.5, "none": None}[mask]
    expected_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD, mask_TE)
    assert_close(TritonFFN(weights, dtype).run(x_TD, mask_TE, config=TINY), expected_TD)


@tokens_one_or_more
@every_dtype
def test_drelu(dtype: torch.dtype, tokens: int) -> None:
    weights, x_TD = make("relu", "relu"), torch.randn(tokens, WIDTH)
    expected_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD, None)
    assert_close(TritonFFN(weights, dtype).run(x_TD, config=TINY), expected_TD)


@tokens_one_or_more
@every_dtype
@gated_or_not
@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("soft", [True, False])
def test_what_is_off_adds_its_constant_and_the_residual_comes_last(
    soft: bool, act: str, gated: bool, dtype: torch.dtype, tokens: int
) -> None:
    weights, x_TD = make(act, gated=gated, off=True), torch.randn(tokens, WIDTH)
    mask_TE, residual_TD = torch.rand(tokens, EXPERTS), torch.randn(tokens, WIDTH)
    mask_TE = mask_TE if soft else mask_TE < 0.5
    y_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD, mask_TE)
    packed = TritonFFN(weights, dtype)
    assert_close(packed.run(x_TD, mask_TE, residual_TD, config=TINY), residual_TD + y_TD)
    assert_close(packed(x_TD, mask_TE, residual_TD), residual_TD + y_TD)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 20),
    width=st.integers(1, 80),
    neurons=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.int8, INT4]),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_any_shape(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, share: float, data: Any
) -> None:
    gate_FD, up_FD, down_FD = (torch.randn(neurons, width) for _ in range(3))
    weights = FFNWeights(up_FD, down_FD, "gelu", gate_FD, off_F=torch.randn(neurons))
    x_TD = torch.randn(tokens, width)
    mask_TE = torch.rand(tokens, data.draw(st.integers(1, neurons))) < share
    expected_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD, mask_TE)
    assert_close(TritonFFN(weights, dtype).run(x_TD, mask_TE, config=TINY), expected_TD, 1e-4)


@tokens_one_or_more
@few_bits
@pytest.mark.parametrize(
    ("x_dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_small_scales_lose_nothing_in_half_precision(
    x_dtype: torch.dtype, tolerance: float, dtype: torch.dtype, tokens: int
) -> None:
    """h times a scale would be below what fp16 holds: the rows are 2e-3 of what h is."""
    weights = replace(make(), down_FD=torch.randn(NEURONS, WIDTH) * 2e-3, down_D=None)
    packed, x_TD = TritonFFN(weights, dtype), torch.randn(tokens, WIDTH).to(x_dtype)
    expected_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD.float(), None)
    y_TD = packed.run(x_TD, config=TINY)
    assert y_TD.dtype == x_dtype
    assert_close(y_TD.float(), expected_TD, tolerance)


@few_bits
def test_what_lies_on_the_grid_already_stays(dtype: torch.dtype) -> None:
    weights = rounded(make(), dtype)
    for matrix_FD in weights.matrices():
        values_FD = store(matrix_FD, dtype).values_FD(WIDTH, torch.float32)
        torch.testing.assert_close(values_FD, matrix_FD, rtol=1e-6, atol=0)


@few_bits
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64])
def test_rows_begin_at_16_bytes_and_stand_for_their_codes(width: int, dtype: torch.dtype) -> None:
    weight_FD = torch.randn(5, width)
    rows = store(weight_FD, dtype)
    assert rows.stored.stride(0) % 16 == 0
    expected_FD = store_rows(weight_FD, 8 if dtype == torch.int8 else 4).values_FD()
    assert torch.equal(rows.values_FD(width, torch.float32), expected_FD)


@pytest.mark.interpreter
@tokens_one_or_more
@few_bits
def test_a_row_is_its_bytes_and_its_scales(dtype: torch.dtype, tokens: int) -> None:
    width = 64
    weights = FFNWeights(torch.randn(67, width), torch.randn(67, width), "silu")
    mask_TE = torch.rand(tokens, 9) < 0.4
    packed = TritonFFN(weights, dtype)
    with count_loads() as loads:
        packed.run(torch.randn(tokens, width), mask_TE, config=TINY)
    rows = neuron_mask(mask_TE, 67).any(0).nonzero().flatten().tolist()
    for one in packed.stored:
        assert loads.rows_of(one.stored) == rows
        assert loads.bytes_of(one.stored) == len(rows) * width * BITS[dtype] // 8
        assert one.scale_FG is not None and loads.rows_of(one.scale_FG) == rows


# A router's scores and a proposal, and the mask that either means.
def linear_scores(
    weights: FFNWeights, x_TD: Tensor, *, shared: int = 0, bias: bool = True, experts: int = EXPERTS
) -> tuple[Scores, Tensor]:
    z_TK = torch.randn(*x_TD.shape[:-1], 13)
    weight_RK = torch.randn(experts - shared, 13)
    bias_R = torch.randn(experts - shared) if bias else None
    on_TR = torch.sigmoid(linear(z_TK, weight_RK, bias_R)) > 0.4
    on_TE = torch.nn.functional.pad(on_TR, (shared, 0), value=True)
    return LinearScores(z_TK, weight_RK, bias_R, 0.4, shared), on_TE


def few_bit_scores(weights: FFNWeights, x_TD: Tensor, *, bits: int = 4) -> tuple[Scores, Tensor]:
    copies = [copy_rows(rows_FD, bits) for rows_FD, _, _ in weights.inputs]
    h_TF = torch.ones(())
    for few, (_, bias_F, act) in zip(copies, weights.inputs, strict=True):
        h_TF = h_TF * act(linear(x_TD, few.values_FD(), bias_F))
    norm_F = weights.down_norm_F
    on_TF = h_TF.abs() * norm_F > 0.3
    first, *second = map(of_codes, copies)
    return FewBitScores(x_TD, first, second[0] if second else None, norm_F, 0.3), on_TF


SCORES: dict[str, Callable[[FFNWeights, Tensor], tuple[Scores, Tensor]]] = {
    "router": linear_scores,
    "router without bias": partial(linear_scores, bias=False),
    "router and shared experts": partial(linear_scores, shared=2),
    "router of neurons": partial(linear_scores, experts=NEURONS),
    "router of one expert": partial(linear_scores, experts=1),
    **{f"copies in {bits} bits": partial(few_bit_scores, bits=bits) for bits in (2, 3, 4, 8)},
}


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("config", [TINY, None], ids=["tiny", "pinned"])
def test_an_ffn_selects_by_itself(config: Config | None, kind: str, tokens: int) -> None:
    weights, x_TD = make(off=True), torch.randn(tokens, WIDTH)
    scores, on_TE = SCORES[kind](weights, x_TD)
    packed, residual_TD = TritonFFN(weights, torch.float32), torch.randn(tokens, WIDTH)
    assert packed.takes(x_TD, scores)
    expected_TD = residual_TD + sparse_ffn_reference(weights, x_TD, on_TE)
    assert_close(packed.scored(x_TD, scores, residual_TD, config=config), expected_TD)


@gated_or_not
@few_bits
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_so_does_one_in_few_bits(act: str, dtype: torch.dtype, gated: bool) -> None:
    weights, x_TD = make(act, gated=gated), torch.randn(2, 3, WIDTH)
    for choose in (linear_scores, few_bit_scores):
        scores, on_TE = choose(weights, x_TD)
        expected_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD, on_TE)
        assert_close(TritonFFN(weights, dtype).scored(x_TD, scores, config=TINY), expected_TD)


def test_experts_that_are_too_large_for_one_program_are_masked() -> None:
    neurons = 3000
    weights = FFNWeights(torch.randn(neurons, 4), torch.randn(neurons, 4), "silu")
    x_TD = torch.randn(1, 4)
    scores = LinearScores(x_TD, torch.randn(2, 4), None, 0.5)
    assert not TritonFFN(weights, torch.float32).takes(x_TD, scores)


@pytest.mark.interpreter
def test_a_router_is_read_once_and_no_row_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TD = make(), torch.randn(1, WIDTH)
    scores, on_TE = linear_scores(weights, x_TD)
    assert isinstance(scores, LinearScores)
    packed = TritonFFN(weights, torch.float32)
    with count_loads() as loads:
        packed.scored(x_TD, scores, config=TINY)
    assert loads.bytes_of(scores.weight_RK) == 4 * scores.weight_RK.numel()
    rows = neuron_mask(on_TE, NEURONS).any(0).nonzero().flatten().tolist()
    for one in packed.stored:
        assert loads.rows_of(one.stored) == rows


def test_dense_products_take_over_where_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a card that nobody measured, at half of the neurons: from two tokens on."""
    ran: list[str] = []
    run = KernelLaunch.run
    monkeypatch.setattr(KernelLaunch, "run", lambda one: (ran.append(one.name), run(one)))
    weights = make(off=True)
    packed = TritonFFN(weights, torch.float32, or_dense=True)
    for tokens, sparse in ((1, True), (2, False), (40, False)):
        x_TD, mask_TE = torch.randn(tokens, WIDTH), torch.rand(tokens, EXPERTS) < 0.5
        residual_TD = torch.randn(tokens, WIDTH)
        ran.clear()
        y_TD = packed(x_TD, mask_TE, residual_TD)
        assert bool(ran) == sparse
        assert_close(y_TD, residual_TD + sparse_ffn_reference(weights, x_TD, mask_TE))
    few = TritonFFN(weights, torch.float32, or_dense=True, share=0.02)
    ran.clear()
    few(torch.randn(4, WIDTH), torch.rand(4, EXPERTS) < 0.1)
    assert ran
    assert few.takes(torch.randn(2, WIDTH), linear_scores(weights, torch.randn(2, WIDTH))[0])
    assert not packed.takes(torch.randn(2, WIDTH), linear_scores(weights, torch.randn(2, WIDTH))[0])


@every_dtype
def test_dense_products_multiply_by_the_stored_numbers(dtype: torch.dtype) -> None:
    weights, x_TD, mask_TE = make(), torch.randn(9, WIDTH), torch.rand(9, EXPERTS) < 0.5
    packed = TritonFFN(weights, dtype, or_dense=True)
    with NoHostReads():
        y_TD = packed(x_TD, mask_TE)
    assert_close(y_TD, sparse_ffn_reference(rounded(weights, dtype), x_TD, mask_TE))


@pytest.mark.interpreter
def test_a_table_decides_for_its_card_and_names_the_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = tuple(TINY.numbers)
    entries = [
        limits.Entry(
            device="cpu",
            dtype="fp32",
            kind="given",
            width=40,
            neurons=48,
            tokens=tokens,
            share=share,
            tiles=tiles,
        )
        for tokens, share in ((1, 0.2), (16, 0.9))
    ]
    monkeypatch.setattr(limits, "in_force", [])
    limits.put_in_force(entries)
    seen: list[KernelLaunch] = []
    run = KernelLaunch.run
    monkeypatch.setattr(KernelLaunch, "run", lambda one: (seen.append(one), run(one)))
    packed = TritonFFN(make(), torch.float32, or_dense=True, share=0.25)
    packed(torch.randn(1, WIDTH))
    assert not seen  # a quarter is more than a fifth
    packed(torch.randn(16, WIDTH))
    assert not seen  # sixteen tokens want 99 % of the neurons
    packed = TritonFFN(make(), torch.float32, or_dense=True, share=0.1)
    packed(torch.randn(5, WIDTH))
    assert seen and seen[0].arguments["TILE"] == TINY.tile


def test_the_dtype_of_x_may_be_another_than_that_of_the_weights() -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    packed = TritonFFN(weights, torch.float16)
    y_TD = packed.run(x_TD, config=TINY)
    assert y_TD.dtype == torch.float32
    stored = rounded(weights, torch.float16).changed(Tensor.float, Tensor.float)
    assert_close(y_TD, sparse_ffn_reference(stored, x_TD, None))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken for those of a GPU, and the log has said nothing yet."""
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    kernels._announce_card.cache_clear()
    kernels.left_to_pytorch.cache_clear()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", [None, *BITS], ids=str)
def test_auto_takes_the_kernels_on_a_gpu_and_says_so(
    dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    weights, x_TD = make(off=True), torch.randn(1, WIDTH)
    with caplog.at_level(logging.INFO, "moe_tools"):
        packed = [pack(weights, dtype=dtype) for _ in range(2)]
    assert [one.backend for one in packed] == ["triton", "triton"]
    assert [one.getMessage().split("; ")[1] for one in caplog.records] == [
        "products take over by guesses: `make gpu` measures this card"
    ]
    exact = weights if dtype is None else rounded(weights, dtype)
    assert_close(packed[0](x_TD), sparse_ffn_reference(exact, x_TD, None))


@pytest.mark.usefixtures("on_gpu")
def test_auto_leaves_to_pytorch_what_no_kernel_computes(caplog: pytest.LogCaptureFixture) -> None:
    strange = replace(make(), act=torch.tanh)
    with caplog.at_level(logging.WARNING, "moe_tools"):
        packed = pack(strange)
    assert packed.backend == "reference"
    assert "runs on PyTorch alone: backend 'triton' knows activations by name" in caplog.text
    with pytest.raises(ValueError, match="knows activations by name"):
        pack(strange, dtype=torch.int8)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("tokens", "learns", "ran"), [(1, 0, 1), (1, 1, 0), (9, 0, 0)])
def test_a_single_call_takes_them_for_one_token_and_no_mask_that_learns(
    tokens: int, learns: int, ran: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    run = KernelLaunch.run
    monkeypatch.setattr(KernelLaunch, "run", lambda one: (seen.append(one.name), run(one)))
    weights, x_TD = make(), torch.randn(tokens, WIDTH)
    mask_TE = torch.rand(tokens, EXPERTS).requires_grad_(bool(learns))
    y_TD = sparse_ffn(
        x_TD,
        weights.up_FD,
        weights.down_FD,
        mask_TE,
        act="silu",
        gate_FD=weights.gate_FD,
        up_F=weights.up_F,
        gate_F=weights.gate_F,
        down_D=weights.down_D,
    )
    assert bool(seen) == bool(ran)
    assert_close(y_TD, sparse_ffn_reference(weights, x_TD, mask_TE))


@few_bits
def test_pack_stores_few_bits(dtype: torch.dtype) -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    packed = pack(weights, dtype=dtype, backend="triton")
    assert_close(packed(x_TD), sparse_ffn_reference(rounded(weights, dtype), x_TD, None))


@every_dtype
def test_rows_are_copied_whatever_was_packed(dtype: torch.dtype) -> None:
    weights, x_TD = replace(make(), down_FD=torch.randn(WIDTH, NEURONS).T), torch.randn(2, WIDTH)
    packed = pack(weights, dtype=dtype, backend="triton")
    expected_TD = sparse_ffn_reference(rounded(weights, dtype), x_TD, None)
    weights.down_FD.zero_()
    assert_close(packed(x_TD), expected_TD)


@every_dtype
def test_a_pickle_and_a_copy_compute_the_same(dtype: torch.dtype) -> None:
    packed, x_TD = TritonFFN(make(off=True), dtype), torch.randn(2, WIDTH)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x_TD), packed(x_TD))


def test_a_gradient_is_refused() -> None:
    packed = TritonFFN(make(), torch.float32)
    with pytest.raises(ValueError, match="a packed FFN has no gradients"):
        packed(torch.randn(2, WIDTH, requires_grad=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "stores float32, bfloat16, float16, int8 or int4, not torch.fl"),
        ({"act": torch.tanh}, "^backend 'triton' knows activations by name"),
    ],
    ids=["dtype", "function"],
)
def test_what_cannot_be_stored_is_named(changes: dict[str, Any], message: str) -> None:
    dtype = changes.pop("dtype", torch.float32)
    with pytest.raises(ValueError, match=message):
        pack(replace(make(), **changes), dtype=dtype, backend="triton")


def test_what_cannot_be_computed_is_named() -> None:
    packed, x_TD = TritonFFN(make(), torch.float32), torch.randn(2, WIDTH)
    with pytest.raises(ValueError, match=r"^x_TD is torch\.float64: the kernels take float32"):
        packed(x_TD.double())
    scores, _ = linear_scores(make(), x_TD)
    with pytest.raises(ValueError, match="residual_TD on meta: backend 'triton' wants all of a c"):
        packed.scored(x_TD, scores, x_TD.to("meta"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("router", {"z_TK": torch.zeros(3, 13)}, r"^z_TK is \(3, 13\), but must be \(2, 13\)"),
        ("router", {"z_TK": torch.zeros(2, 12)}, r"^z_TK is \(2, 12\), but must be \(2, 13\)"),
        ("router", {"bias_R": torch.zeros(3)}, r"^bias_R is \(3,\), but must be \(7,\)"),
        ("router", {"weight_RK": torch.ones(7)}, r"^weight_RK is \(7,\), but has rows and columns"),
        ("router", {"shared": 40}, "^45 neurons cannot make 47 experts, 40 shared"),
        ("copies in 4 bits", {"norm_F": torch.ones(44)}, r"^norm_F is \(44,\), but must be \(45,"),
        (
            "copies in 4 bits",
            {"z_TD": torch.ones(2, 40)},
            r"^z_TD is \(2, 40\), but must be",
        ),
        (
            "copies in 4 bits",
            {"gate": store(torch.ones(45, WIDTH), INT4)},
            r"^copies have offsets 0\.0 and 0\.5, but must have one",
        ),
        ("copies in 4 bits", {"up": None}, "^copies are of gate and up where the FFN has a gate"),
        (
            "copies in 4 bits",
            {"gate": of_codes(copy_rows(torch.ones(44, WIDTH), 4))},
            r"^a copy has scales of \(44, 2\), but must have \(45, 2\)",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    scores, _ = SCORES[kind](weights, x_TD)
    with pytest.raises(ValueError, match=message):
        TritonFFN(weights, torch.float32).scored(x_TD, scores._replace(**changes))


@pytest.mark.parametrize(
    "residual_TD",
    [torch.ones(1, WIDTH), torch.ones(WIDTH), torch.ones(2, 1), torch.ones(2, WIDTH).half()],
    ids=["one row", "vector", "one column", "dtype"],
)
def test_a_residual_that_is_not_like_x_is_refused(residual_TD: Tensor) -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    packed, (scores, _) = TritonFFN(weights, torch.float32), linear_scores(weights, x_TD)
    calls = (
        lambda: packed(x_TD, None, residual_TD),
        lambda: packed.run(x_TD, None, residual_TD),
        lambda: packed.scored(x_TD, scores, residual_TD),
        lambda: pack(weights, backend="reference")(x_TD, None, residual_TD),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^residual_TD is .*, but must be as x_TD"):
            call()


@pytest.mark.parametrize("asks", ["x", "residual"])
def test_no_way_to_call_drops_a_gradient(asks: str) -> None:
    weights = make()
    x_TD, residual_TD = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    (x_TD if asks == "x" else residual_TD).requires_grad_()
    packed, (scores, _) = TritonFFN(weights, torch.float32), linear_scores(weights, x_TD)
    for call in (packed.scored, packed.run, packed):
        operand: Any = scores if call == packed.scored else None
        with pytest.raises(ValueError, match="a packed FFN has no gradients"):
            call(x_TD, operand, residual_TD)


@pytest.mark.parametrize("share", [0.0, -1, 5, float("nan"), "x", True])
def test_a_share_that_cannot_be_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"^share is .*, but must be in \(0, 1\]"):
        pack(make(), backend="triton", share=share)


def test_gates_go_first_only_where_nothing_is_lost() -> None:
    for weights in (make("silu"), make("relu", off=True)):
        with pytest.raises(ValueError, match=r"^gate_first needs an activation that"):
            TritonFFN(weights, torch.float32).run(torch.randn(2, WIDTH), gate_first=True)


@pytest.mark.parametrize("name", ["weight_RK", "bias_R"])
def test_a_router_that_is_elsewhere_is_refused(name: str) -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    scores, _ = linear_scores(weights, x_TD)
    moved = scores._replace(**{name: getattr(scores, name).to("meta")})
    with pytest.raises(ValueError, match=rf"{name} on meta: backend 'triton' wants all"):
        TritonFFN(weights, torch.float32).scored(x_TD, moved)


@pytest.mark.parametrize("kind", ["router", "copies in 4 bits"])
def test_no_tokens(kind: str) -> None:
    weights, x_TD = make(), torch.randn(0, WIDTH)
    packed = TritonFFN(weights, torch.float32)
    assert packed.scored(x_TD, SCORES[kind](weights, x_TD)[0], x_TD).shape == (0, WIDTH)
    assert packed(x_TD, torch.ones(0, 3)).shape == (0, WIDTH)


def test_every_activation_that_is_named_is_known_to_a_proposal() -> None:
    for act in ("identity", "relu2", "gelu", "gelu_tanh", Act("shifted_relu", 0.2)):
        weights, x_TD = make(act), torch.randn(3, WIDTH)
        assert isinstance(named(act), Act)
        scores, on_TF = few_bit_scores(weights, x_TD)
        y_TD = TritonFFN(weights, torch.float32).scored(x_TD, scores, config=TINY)
        assert_close(y_TD, sparse_ffn_reference(weights, x_TD, on_TF))
