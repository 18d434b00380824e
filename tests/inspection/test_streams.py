"""The parts of an inspection that see a stream, against the whole stream at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.inspection.histogram import BINS, Histogram
from moe_tools.inspection.responses import Responses
from moe_tools.inspection.similarity import LEAST, SAMPLE, Similarity
from moe_tools.inspection.watch import NOTHING, Seen

NUMBERS = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(NUMBERS, max_size=20), min_size=1, max_size=5))
def test_every_value_is_in_its_bin(batches):
    histogram = Histogram()
    for batch in batches:
        histogram.add(torch.tensor(batch, dtype=torch.float64))
    values = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    edges = histogram.edges
    assert len(histogram.counts) <= BINS and histogram.counts.sum() == len(values)
    for low, high, count in zip(edges[:-1], edges[1:], histogram.counts.tolist(), strict=True):
        assert count == int(((values >= low) & (values < high)).sum())
        assert not low < 0 < high  # on and off never share a bin


def seen_of(name, mask_TE, first=0, scores_TE=None, elsewhere=0):
    """A pass over len(mask_TE) tokens, `elsewhere` of which an MoE host gave to others."""
    count = len(mask_TE) + elsewhere
    number_T = torch.arange(first, first + count)
    tokens = SimpleNamespace(number_T=number_T, window_TC=number_T[:, None].expand(-1, 3))
    ffn = SimpleNamespace(name=name)
    row_T = torch.arange(len(mask_TE))
    scores_TE = mask_TE.float() if scores_TE is None else scores_TE
    return Seen(ffn, scores_TE, mask_TE, scores_TE, None, tokens, row_T)


def unbiased_cka(one_TE, other_TE):
    """HSIC_1 by its formula, Song et al., JMLR 2012, equation 5."""

    def hsic(k, m):
        n = len(k)
        k, m = k.clone().fill_diagonal_(0), m.clone().fill_diagonal_(0)
        middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return ((k @ m).trace() + middle - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))

    k, m = (mask.double() @ mask.double().T for mask in (one_TE, other_TE))
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def fill(similarity, *passes):
    first = 0
    for masks in passes:
        tokens = None
        for name, mask_TE in zip(similarity.names, masks, strict=True):
            seen = seen_of(name, mask_TE, first)
            tokens = tokens or seen.tokens
            similarity.add(seen._replace(tokens=tokens))
        first += len(masks[0])


def test_similarity_is_the_unbiased_cka():
    one_TE, other_TE = torch.rand(40, 6) > 0.5, torch.rand(40, 9) > 0.3
    similarity = Similarity(["a", "b"], [6, 9])
    fill(similarity, (one_TE, other_TE))
    cka = similarity.cka_LL()
    assert cka[0, 1].item() == pytest.approx(unbiased_cka(one_TE, other_TE).item(), rel=1e-4)
    assert cka.diagonal().tolist() == [pytest.approx(1), pytest.approx(1)]


def test_similarity_of_a_permutation_of_the_experts_is_one():
    mask_TE = torch.rand(30, 6) > 0.5
    similarity = Similarity(["a", "b"], [6, 6])
    fill(similarity, (mask_TE, mask_TE[:, torch.randperm(6)]))
    assert similarity.cka_LL()[0, 1].item() == pytest.approx(1)


def test_short_passes_are_compared_together():
    one_TE, other_TE = torch.rand(24, 6) > 0.5, torch.rand(24, 6) > 0.5
    at_once, stepwise = (Similarity(["a", "b"], [6, 6]) for _ in range(2))
    fill(at_once, (one_TE, other_TE))
    fill(stepwise, *zip(one_TE.split(1), other_TE.split(1), strict=True))
    torch.testing.assert_close(at_once.cka_LL(), stepwise.cka_LL())


def test_a_long_pass_is_sampled():
    one_TE, other_TE = torch.rand(SAMPLE + 50, 6) > 0.5, torch.rand(SAMPLE + 50, 6) > 0.5
    similarity = Similarity(["a", "b"], [6, 6])
    fill(similarity, (one_TE, other_TE))
    expected = unbiased_cka(one_TE[:SAMPLE], other_TE[:SAMPLE])
    assert similarity.cka_LL()[0, 1].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


def test_too_few_tokens_have_no_similarity():
    similarity = Similarity(["a"], [6])
    fill(similarity, (torch.rand(LEAST - 1, 6) > 0.5,))
    assert similarity.cka_LL().isnan().all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_the_best_of_a_stream_are_the_best_of_all(lengths, top):
    total = sum(lengths)
    scores_TE = torch.randperm(total * 3).reshape(total, 3).float()
    responses, first = Responses(3, top, 3), 0
    for part in scores_TE.split(lengths):
        responses.add(seen_of("a", part > total, first, part))
        first += len(part)
    for expert in range(3):
        best = scores_TE[:, expert].topk(min(top, total)).indices.tolist()
        found = [n for n in responses.number_EK[expert].tolist() if n != NOTHING]
        assert found == best
        assert responses.window_EKC[expert, : len(best), 0].tolist() == best
        selected = [bool(scores_TE[token, expert] > total) for token in best]
        assert responses.selected_EK[expert, : len(best)].tolist() == selected


def test_of_equal_scores_those_of_earlier_passes_stay():
    responses = Responses(1, 2, 3)
    for first in (0, 2, 4):
        responses.add(seen_of("a", torch.ones(2, 1, dtype=torch.bool), first))
    assert sorted(responses.number_EK[0].tolist()) == [0, 1]
