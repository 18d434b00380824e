"""A sample of rows: even, ordered, without a period, the same for every tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.experts.sampling import sample_rows


@given(rows=st.integers(0, 5000), most=st.integers(1, 5000))
@settings(deadline=None, derandomize=True, database=None)
def test_a_row_of_each_stretch(rows: int, most: int) -> None:
    taken = sample_rows(torch.arange(rows), most).tolist()
    assert len(taken) == min(rows, most)
    assert taken == sorted(taken)
    stretch = rows / most
    if rows <= most:
        assert taken == list(range(rows))
    else:
        assert all(int(at * stretch) <= row <= (at + 1) * stretch for at, row in enumerate(taken))


@pytest.mark.parametrize("period", [8, 48, 64, 100, 512])
@pytest.mark.parametrize("stride", [2, 3, 4, 16, 48, 64])
def test_what_comes_at_a_period_is_as_frequent_as_in_the_whole(period: int, stride: int) -> None:
    """Every n-th row would have all of it, n times what it is, or nothing."""
    marked_N = (torch.arange(64 * 1024) % period == 0).double()
    found = sample_rows(marked_N, len(marked_N) // stride).mean()
    assert found == pytest.approx(marked_N.mean().item(), abs=0.004, rel=0.25)


def test_tensors_of_as_many_rows_give_the_same_rows() -> None:
    values_NX = torch.rand(1000, 3)
    one, other = sample_rows(values_NX, 77), sample_rows(2 * values_NX, 77)
    assert torch.equal(2 * one, other)
