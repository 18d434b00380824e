"""Rows of several sources and of several epochs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_tools.data import Batches, fingerprint
from moe_tools.data.rows import Epochs, InMemory, Mixed, Row, of_blocks


def numbered(count: int, length: int = 4, first: int = 0) -> InMemory:
    """Row i has token i everywhere."""
    return of_blocks(torch.arange(first, first + count)[:, None].expand(-1, length))


def order(rows: Epochs | Mixed) -> list[int]:
    return [int(rows.row(at).ids_T[0]) for at in range(len(rows))]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 3))
def test_every_epoch_has_every_row_once_in_another_order(
    count: int, epochs: int, seed: int
) -> None:
    rows = Epochs(numbered(count), epochs, seed)
    found = order(rows)
    each = [found[at : at + count] for at in range(0, len(found), count)]
    assert len(each) == epochs and all(sorted(one) == [*range(count)] for one in each)
    assert each[0] == [*range(count)]
    if count > 20:
        assert len({tuple(one) for one in each}) == epochs
    assert order(Epochs(numbered(count), epochs, seed)) == found  # at random, and from the end
    again = Epochs(numbered(count), epochs, seed)
    assert [int(again.row(at).ids_T[0]) for at in reversed(range(len(again)))] == found[::-1]


def test_other_seeds_have_other_orders_from_the_second_epoch_on() -> None:
    one, other = (order(Epochs(numbered(30), 2, seed)) for seed in (0, 1))
    assert one[:30] == other[:30] and one[30:] != other[30:]


@pytest.mark.parametrize(("epochs", "rows"), [(0.5, 15), (1.5, 45), (0.001, 1)])
def test_a_part_of_an_epoch(epochs: float, rows: int) -> None:
    assert len(Epochs(numbered(30), epochs, 0)) == rows


def test_parts_of_epochs_go_on_where_the_last_one_stopped() -> None:
    rows = Epochs(numbered(10), 3, 0)
    parts = [rows.part(0, 12), rows.part(12, 30)]
    assert [int(part.row(at).ids_T[0]) for part in parts for at in range(len(part))] == order(rows)
    assert parts[0].fingerprint != parts[1].fingerprint


def test_a_text_read_twice_is_another_text() -> None:
    names = {Epochs(numbered(10), count, seed).fingerprint for count in (1, 2) for seed in (0, 1)}
    assert len(names) == 4


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.data())
def test_uneven_rows_are_mixed_by_their_tokens(weights: list[float], data: st.DataObject) -> None:
    def uneven(source: int) -> InMemory:
        sizes = data.draw(st.lists(st.integers(1, 8), min_size=60, max_size=60))
        return InMemory(8, False, [Row(np.full(size, source)) for size in sizes])

    sources = [uneven(source) for source in range(len(weights))]
    mixed = Mixed(sources, weights, 200)
    taken = [0] * len(weights)
    for at in range(len(mixed)):
        row = mixed.row(at).ids_T
        taken[int(row[0])] += len(row)
        for own, weight in zip(taken, weights, strict=True):
            assert abs(own - weight / sum(weights) * sum(taken)) <= 8 * len(weights)
    assert mixed.tokens == sum(taken)


def test_batches_are_views_of_their_rows() -> None:
    rows = numbered(11)
    batches = Batches(rows, "joined", 4)
    assert [len(batch.ids_BT) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([batch.ids_BT for batch in batches]), rows.tensor())
    assert batches.tokens == 44 and batches[1:].tokens == 28 and batches[:2].tokens == 32
    assert fingerprint(batches) == fingerprint(rows.tensor())
    assert fingerprint(batches[1:]) == fingerprint(rows.tensor()[4:])
    assert torch.equal(batches[1:][0].ids_BT, batches[1].ids_BT)
    assert torch.equal(batches[-1].ids_BT, rows.tensor()[8:])
    with pytest.raises(IndexError):
        _ = batches[3]
