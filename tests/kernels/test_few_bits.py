"""Weights in few bits: errors that are bounded, grids that are stable, planes that are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.kernels.few_bits import (
    GROUP,
    FewBits,
    bits_each,
    copy_rows,
    group_int8,
    store_rows,
)

property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)
COPIES = [2, 3, 4, 8]
STORED = [4, 8]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows of any width and scale, some of them or some of their groups exactly zero."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 80))
    rows_FD = torch.randn(rows, width) * 10.0 ** torch.randint(-5, 5, (rows, 1))
    if draw(st.booleans()):
        rows_FD[:, : draw(st.integers(1, 40))] = 0
    return rows_FD


def steps_FD(few: FewBits) -> Tensor:
    """The scale of every number."""
    width = few.codes_FD.shape[1]
    return few.scale_FG.float().repeat_interleave(GROUP, 1)[:, :width]


def plain(rows_FD: Tensor, bits: int, largest: float, offset: float) -> Tensor:
    """A slow twin without a search: a loop over groups, the scale holds the largest entry."""
    made = torch.empty_like(rows_FD)
    for row, out in zip(rows_FD, made, strict=True):
        for start in range(0, len(row), GROUP):
            piece = row[start : start + GROUP]
            most = float(piece.abs().max()) / largest
            scale = float(torch.tensor(most if most > 0 else 1.0).bfloat16())
            for index, value in enumerate(piece.tolist()):
                if offset:
                    half = 2 ** (bits - 1)
                    code = min(half - 1, max(-half, value // scale))
                else:
                    top = 2 ** (bits - 1) - 1
                    code = min(top, max(-top, round(value / scale)))
                out[start + index] = (code + offset) * scale
    return made


@pytest.mark.parametrize("bits", COPIES)
@property_test
@given(rows_FD=matrices())
def test_a_copy_is_no_worse_than_one_without_a_search(bits: int, rows_FD: Tensor) -> None:
    few = copy_rows(rows_FD, bits)
    slow = plain(rows_FD, bits, 2 ** (bits - 1) - 0.5, 0.5)
    error, plainly = ((few_FD - rows_FD).square().sum() for few_FD in (few.values_FD(), slow))
    assert error <= plainly * (1 + 1e-4) + 1e-30
    half = 2 ** (bits - 1)
    assert int(few.codes_FD.min()) >= -half and int(few.codes_FD.max()) < half
    assert few.scale_FG.dtype == torch.bfloat16 and (few.scale_FG > 0).all()


@pytest.mark.parametrize("bits", STORED)
@property_test
@given(rows_FD=matrices())
def test_what_is_stored_is_no_worse_than_rounding_and_stays_where_it_is(
    bits: int, rows_FD: Tensor
) -> None:
    few = store_rows(rows_FD, bits)
    slow = plain(rows_FD, bits, 2 ** (bits - 1) - 1, 0.0)
    error, plainly = ((few_FD - rows_FD).square().sum() for few_FD in (few.values_FD(), slow))
    assert error <= plainly * (1 + 1e-4) + 1e-30
    again = store_rows(few.values_FD(), bits)
    assert torch.equal(again.codes_FD, few.codes_FD)
    # bf16 loses digits of code times scale, and no code
    rounded = store_rows(few.values_FD(torch.bfloat16), bits)
    assert torch.equal(rounded.codes_FD, few.codes_FD)


@pytest.mark.parametrize(("stored", "bits"), [(8, 4), (8, 3), (8, 2), (4, 2), (4, 3)])
@property_test
@given(rows_FD=matrices())
def test_high_bits_miss_by_at_most_half_of_their_interval(
    stored: int, bits: int, rows_FD: Tensor
) -> None:
    whole = store_rows(rows_FD, stored)
    high = whole.high_bits(bits)
    spare = 2 ** (stored - bits)
    assert torch.equal(high.codes_FD, torch.div(whole.codes_FD, spare, rounding_mode="floor"))
    low_FD = whole.codes_FD - high.codes_FD * spare  # what the exact pass has left to read
    assert low_FD.min() >= 0 and low_FD.max() < spare
    missed = (high.values_FD() - whole.values_FD()).abs() / steps_FD(whole)
    assert missed.max() <= (spare - 1) / 2 + 1e-4


def test_moments_move_the_error_to_where_inputs_are_small() -> None:
    torch.manual_seed(0)
    rows_FD, moment_D = torch.randn(64, 64), torch.logspace(-2, 2, 64)[torch.randperm(64)]
    x_TD = torch.randn(512, 64) * moment_D.sqrt()

    def missed(moment: Tensor | None) -> float:
        few_FD = copy_rows(rows_FD, 2, moment).values_FD()
        return float((x_TD @ (few_FD - rows_FD).T).square().mean())

    assert missed(moment_D) < 0.9 * missed(None)


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}, but must be one of 2, 3, 4, 8"):
        copy_rows(torch.ones(1, 1), bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"bits is {bits}, but must be one of 4, 8"):
        store_rows(torch.ones(1, 1), bits)  # type: ignore[arg-type]


def test_no_more_high_bits_than_there_are() -> None:
    with pytest.raises(ValueError, match="the highest 4 of 4 bits"):
        store_rows(torch.ones(1, 1), 4).high_bits(4)
    with pytest.raises(ValueError, match="the highest 2 of 4 bits"):
        copy_rows(torch.ones(1, 1), 4).high_bits(2)


def test_bits_of_a_weight_include_its_part_of_the_scale() -> None:
    assert [bits_each(bits) for bits in (None, 8, 4, 2)] == [16, 8.5, 4.5, 2.5]


@property_test
@given(x_TD=matrices())
def test_inputs_in_int8_miss_by_half_a_step(x_TD: Tensor) -> None:
    rounded = group_int8(x_TD)
    for start in range(0, x_TD.shape[1], GROUP):
        part, kept = x_TD[:, start : start + GROUP], rounded[:, start : start + GROUP]
        step = part.abs().amax(1, keepdim=True) / 127
        assert ((part - kept).abs() <= step / 2 + step * 1e-3).all()
