"""Recall, precision and predicted sparsity, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.experts.prediction import Prediction, merge_predictions

property_test = settings(deadline=None, max_examples=40, derandomize=True, database=None)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@property_test
def test_shares_are_those_of_the_definitions(pairs: list[tuple[bool, bool]]) -> None:
    mask_TF, nonzero_TF = (torch.tensor(column)[None] for column in zip(*pairs, strict=True))
    prediction = Prediction()
    prediction.add(mask_TF, nonzero_TF)
    on = [nonzero for predicted, nonzero in pairs if predicted]
    true = [predicted for predicted, nonzero in pairs if nonzero]
    assert prediction.precision == (sum(on) / len(on) if on else 1)
    assert prediction.recall == (sum(true) / len(true) if true else 1)
    assert prediction.sparsity == pytest.approx(1 - len(on) / len(pairs))


def test_batches_and_ffns_add_up() -> None:
    first, second, both = Prediction(), Prediction(), Prediction()
    for one in (first, first, second):
        mask_TF, nonzero_TF = torch.rand(3, 4, 5) < 0.5, torch.rand(3, 4, 5) < 0.3
        one.add(mask_TF, nonzero_TF)
        both.add(mask_TF, nonzero_TF)
    assert merge_predictions([first, second]) == both
    assert first.seen == 120 and both.seen == 180
    shares = {"recall": both.recall, "precision": both.precision, "sparsity": both.sparsity}
    counts = {"seen": 180, "on": both.on, "nonzero": both.nonzero, "hits": both.hits}
    assert both.figures() == {**shares, **counts}


def test_nothing_seen_is_nothing_missed() -> None:
    assert merge_predictions([]) == Prediction()
    assert (Prediction().recall, Prediction().precision, Prediction().sparsity) == (1, 1, 0)
