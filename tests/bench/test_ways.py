"""What benchmarks of kernels share: turns, rows, and random FFNs as sparse as they are meant."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from moe_tools.bench.rounds import in_turn, median_ratio
from moe_tools.bench.ways import (
    FATRELU,
    Way,
    dense_ffn,
    random_ffn,
    random_input,
    random_masks,
    timings,
    with_gates_off,
)
from moe_tools.kernels.activations import Act
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights


def test_measures_take_turns_and_the_first_rounds_do_not_count() -> None:
    said: list[str] = []

    def measure(name: str) -> int:
        said.append(name)
        return len(said)

    found = in_turn([lambda: measure("a"), lambda: measure("b")], 2, warm_up=1)
    assert said == ["a", "b"] * 3
    assert found == [[3, 5], [4, 6]]


def test_a_ratio_is_taken_round_by_round() -> None:
    assert median_ratio([2.0, 9.0, 10.0], [1.0, 3.0, 1.0]) == 3.0


def test_a_row_is_held_against_dense_of_as_many_tokens() -> None:
    def way(operation: str, tokens: int, size: int) -> Way:
        return Way(operation, torch.bfloat16, tokens, 0.5, size, [])

    given = [way("F.linear", 1, 4000), way("experts", 1, 2000), way("F.linear", 4, 4000)]
    rows = timings(given, [[4.0, 6.0, 5.0], [2.0, 2.0, 1.0], [8.0, 8.0, 8.0]], bandwidth=1e3)
    assert [row.speedup for row in rows] == [1.0, 3.0, 1.0]  # medians of 2, 3, 5 and of ones
    assert rows[1].ms == 2000.0
    assert rows[1].gigabytes_per_second == pytest.approx(2000 / 2 / 1e9)
    assert rows[1].share_of_bandwidth == pytest.approx(1.0)
    assert (rows[1].tokens, rows[1].dtype) == (1, "bfloat16")


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_gates_are_off_as_often_as_they_are_meant(sparsity: float) -> None:
    gate_FD, _, _ = random_ffn(64, 4096, torch.float32)
    x_TD = with_gates_off(random_input(8, 64, torch.float32), sparsity)
    off = (linear(x_TD, gate_FD) < FATRELU.threshold).float().mean()
    assert float(off) == pytest.approx(sparsity, abs=0.02)


def test_masks_are_as_sparse_as_they_are_meant_for_each_token() -> None:
    masks = random_masks(3, 5, 40, 0.9)
    assert len(masks) == 3
    assert all(mask_TE.sum(-1).tolist() == [4] * 5 for mask_TE in masks)
    assert not torch.equal(masks[0], masks[1])


def test_the_dense_way_is_a_gated_ffn() -> None:
    gate_FD, up_FD, down_FD = random_ffn(6, 10, torch.float64)
    x_TD = random_input(3, 6, torch.float64)
    transposed_FD = down_FD.view(6, 10).T
    weights = FFNWeights(up_FD, transposed_FD, Act("silu"), gate_FD)
    torch.testing.assert_close(
        dense_ffn(x_TD, gate_FD, up_FD, down_FD), sparse_ffn_reference(weights, x_TD, None)
    )
