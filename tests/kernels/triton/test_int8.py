"""Weights in eight bits, a scale a row: every operation against the rounded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.quantize import quantize_rows
from moe_tools.kernels.reference import neuron_mask, sparse_ffn_reference
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.weights import FFNWeights

pytest.importorskip("triton")

from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.ffn import TritonFFN, sparse_ffn_triton
from tools.traffic import count_loads

TINY = Config(16, 16, 4, 16, 8, 16, 2, 4)
WIDTH, EXPERTS, NEURONS = 21, 7, 45
tokens_one_or_more = pytest.mark.parametrize("tokens", [1, 5])


def make(act: str | Act = "silu", up_act: str = "identity", gated: bool = True) -> FFNWeights:
    """Rows whose sizes differ a lot, as their scales then do."""
    sizes_F1 = torch.logspace(-4, 1, NEURONS)[torch.randperm(NEURONS), None]
    up_FD, down_FD, gate_FD = (torch.randn(NEURONS, WIDTH) for _ in range(3))
    biases = {"up_F": torch.randn(NEURONS), "down_D": torch.randn(WIDTH)}
    if gated:
        biases["gate_F"] = torch.randn(NEURONS)
    return FFNWeights(
        up_FD, down_FD * sizes_F1, act, gate_FD if gated else None, up_act=up_act, **biases
    )


def rounded(weights: FFNWeights) -> FFNWeights:
    """With one scale a row, other than on a CPU."""

    def matrix(weight_FD: Tensor) -> Tensor:
        rows_FD, scale_F = quantize_rows(weight_FD)
        return rows_FD * scale_F[:, None]

    return weights.changed(matrix, lambda bias: bias)


def packed_run(packed: Any, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
    return sparse_ffn_triton(packed.weights, x_TD, mask_TE, scales=packed.scales, config=TINY)


@tokens_one_or_more
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ["silu", "relu", Act("fatrelu", 0.5)], ids=str)
@pytest.mark.parametrize("soft", [True, False])
def test_int8_equals_the_rounded_weights(
    act: str | Act, gated: bool, tokens: int, soft: bool
) -> None:
    weights = make(act, gated=gated)
    mask_TE = torch.rand(tokens, EXPERTS)
    x_TD, mask_TE = torch.randn(tokens, WIDTH), mask_TE if soft else mask_TE < 0.5
    expected_TD = sparse_ffn_reference(rounded(weights), x_TD, mask_TE)
    y_TD = packed_run(TritonFFN(weights, torch.int8), x_TD, mask_TE)
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5 * largest)


@tokens_one_or_more
def test_drelu_in_int8(tokens: int) -> None:
    weights, x_TD = make("relu", "relu"), torch.randn(tokens, WIDTH)
    expected_TD = sparse_ffn_reference(rounded(weights), x_TD, None)
    y_TD = packed_run(TritonFFN(weights, torch.int8), x_TD, None)
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5 * largest)


@tokens_one_or_more
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_small_scales_lose_nothing_in_half_precision(
    dtype: torch.dtype, tolerance: float, tokens: int
) -> None:
    """h times a scale would be below what fp16 holds: the rows are 2e-5 of what h is."""
    weights = make().changed(lambda t: t.to(dtype), lambda t: t.to(dtype))
    weights = replace(weights, down_FD=weights.down_FD * 2e-5, down_D=None)
    packed, x_TD = TritonFFN(weights, torch.int8), torch.randn(tokens, WIDTH).to(dtype)
    assert packed.scales is not None

    def exact(rows_FD: Tensor, scale_F: Tensor) -> Tensor:
        return rows_FD.float() * scale_F[:, None]

    stored, scales = packed.weights, packed.scales
    assert stored.gate_FD is not None and scales.gate_F is not None
    stands_for = replace(
        stored.changed(lambda t: t, lambda t: t.float()),
        up_FD=exact(stored.up_FD, scales.up_F),
        down_FD=exact(stored.down_FD, scales.down_F),
        gate_FD=exact(stored.gate_FD, scales.gate_F),
    )
    expected_TD = sparse_ffn_reference(stands_for, x_TD.float(), None)
    y_TD = packed_run(packed, x_TD, None).float()
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.interpreter
@tokens_one_or_more
def test_a_row_is_one_byte_an_element_and_a_scale(tokens: int) -> None:
    weights, mask_TE = make(), torch.rand(tokens, EXPERTS) < 0.4
    packed = TritonFFN(weights, torch.int8)
    with count_loads() as loads:
        packed_run(packed, torch.randn(tokens, WIDTH), mask_TE)
    rows = neuron_mask(mask_TE, NEURONS).any(0).nonzero().flatten().tolist()
    stored = packed.weights
    assert stored.gate_FD is not None and packed.scales is not None
    for weight_FD in (stored.gate_FD, stored.up_FD, stored.down_FD):
        assert loads.rows_of(weight_FD) == rows
        assert loads.bytes_of(weight_FD) == len(rows) * WIDTH
    columns = -(-WIDTH // TINY.down_columns)  # each column of programs reads the scales of down
    assert loads.bytes_of(packed.scales.up_F) == 4 * len(rows)
    assert loads.bytes_of(packed.scales.down_F) == 4 * len(rows) * columns


def test_pack_chooses_int8() -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    packed = pack(weights, dtype=torch.int8, backend="triton")
    assert packed.weights.up_FD.dtype == torch.int8
    expected_TD = sparse_ffn_reference(rounded(weights), x_TD, None)
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(packed(x_TD), expected_TD, rtol=1e-5, atol=1e-5 * largest)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "half of a fused one": lambda scale_F: torch.stack([-scale_F, scale_F], 1).flatten()[1::2],
    "one number": lambda scale_F: scale_F[3:4].expand(len(scale_F)),
}


@pytest.mark.parametrize(("act", "tokens"), [("silu", 1), ("relu", 5)])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("name", "gated"),
    [("gate_F", True), ("up_F", True), ("down_F", True), ("up_F", False), ("down_F", False)],
    ids=["gate_F", "up_F", "down_F", "up_F-plain", "down_F-plain"],
)
def test_scales_may_be_views(name: str, gated: bool, view: str, act: str, tokens: int) -> None:
    packed, x_TD = TritonFFN(make(act, gated=gated), torch.int8), torch.randn(tokens, WIDTH)
    assert packed.scales is not None
    given = VIEWS[view](getattr(packed.scales, name))
    assert not given.is_contiguous()
    scales = packed.scales._replace(**{name: given})
    copied = packed.scales._replace(**{name: given.contiguous()})
    y_TD = sparse_ffn_triton(packed.weights, x_TD, scales=scales, config=TINY)
    expected_TD = sparse_ffn_triton(packed.weights, x_TD, scales=copied, config=TINY)
    assert torch.equal(y_TD, expected_TD)


def test_int8_rows_are_contiguous_whatever_was_packed() -> None:
    weights, x_TD = make(), torch.randn(2, WIDTH)
    weights = replace(weights, down_FD=torch.randn(WIDTH, NEURONS).T)
    packed = pack(weights, dtype=torch.int8, backend="triton")
    expected_TD = sparse_ffn_reference(rounded(weights), x_TD, None)
    largest = expected_TD.abs().max().item()
    torch.testing.assert_close(packed(x_TD), expected_TD, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("asks", ["x_TD", "mask_TE", "gate_F", "up_F", "down_D", "scales"])
def test_int8_has_no_gradients(asks: str) -> None:
    packed = TritonFFN(make(), torch.int8)
    x_TD, mask_TE = torch.randn(2, WIDTH), torch.rand(2, 3)
    assert packed.scales is not None
    others = {"x_TD": x_TD, "mask_TE": mask_TE, "scales": packed.scales.down_F}
    (others[asks] if asks in others else getattr(packed.weights, asks)).requires_grad_()
    with pytest.raises(ValueError, match=r"int8 weights have no gradients: call under torch\.no"):
        packed_run(packed, x_TD, mask_TE)
    with torch.no_grad():
        assert packed_run(packed, x_TD, mask_TE).isfinite().all()


def test_int8_needs_its_scales() -> None:
    packed = TritonFFN(make(), torch.int8)
    with pytest.raises(ValueError, match=r"up_FD torch\.int8: backend 'triton' takes .*`scales`"):
        sparse_ffn_triton(packed.weights, torch.randn(2, WIDTH))
