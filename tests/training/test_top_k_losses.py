"""Distillation from the most likely tokens alone: value and gradient, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moe_tools.names import IGNORE
from moe_tools.training.logit_losses import ROWS, logit_losses
from moe_tools.training.top_k_losses import keep_top, top_k_losses
from tests.training.test_logit_losses import sample


def definition(logits_TV: Tensor, donor_TV: Tensor, labels_T: Tensor, k: int) -> Tensor:
    """KL_k, token by token: the k tokens, and all others as one."""
    total = torch.zeros((), dtype=logits_TV.dtype)
    tokens = [t for t in range(len(labels_T)) if labels_T[t] != IGNORE]
    for t in tokens:
        p_V, q_V = logits_TV[t].softmax(-1), donor_TV[t].softmax(-1)
        top = q_V.topk(k).indices
        others = torch.ones(len(p_V), dtype=torch.bool).index_fill(0, top, False)
        total = total + (q_V[top] * (q_V[top] / p_V[top]).log()).sum()
        if others.any():
            total = total + q_V[others].sum() * (q_V[others].sum() / p_V[others].sum()).log()
    return total / len(tokens)


@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 33),
    share=st.floats(0.01, 1.0),
    ignored=st.sampled_from([0.0, 0.5]),
    lm=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 999),
)
@example(2 * ROWS + 1, 5, 0.4, 0.3, 1.0, 0)
def test_it_is_the_definition(
    tokens: int, vocabulary: int, share: float, ignored: float, lm: float, seed: int
) -> None:
    logits_TV, labels_T, donor_TV = sample(tokens, vocabulary, ignored, seed)
    k = max(1, round(share * vocabulary))
    exact_TV = logits_TV.double().requires_grad_()
    wanted = definition(exact_TV, donor_TV.double(), labels_T, k)
    cross = functional.cross_entropy(exact_TV, labels_T, ignore_index=IGNORE)
    (1.5 * wanted + lm * cross).backward()
    logits_TV.requires_grad_()
    said = keep_top(donor_TV, k)
    total, parts = top_k_losses(logits_TV, labels_T, *said, lm_weight=lm, distill_weight=1.5)
    total.backward()
    assert parts.distill.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    assert parts.lm.item() == pytest.approx(cross.item(), rel=1e-5, abs=1e-6)
    assert total.item() == pytest.approx(
        1.5 * wanted.item() + lm * cross.item(), rel=1e-4, abs=1e-6
    )
    assert logits_TV.grad is not None and exact_TV.grad is not None
    assert (logits_TV.grad - exact_TV.grad).abs().max() < 5e-6


def test_with_the_whole_vocabulary_it_is_the_exact_loss() -> None:
    logits_TV, labels_T, donor_TV = sample(40, 33, 0.3, 0)
    weights = {"lm_weight": 1.0, "distill_weight": 2.0}
    grads, values = [], []
    for compute in (
        lambda x: logit_losses(x, labels_T, donor_TV, **weights),
        lambda x: top_k_losses(x, labels_T, *keep_top(donor_TV, 33), **weights),
    ):
        x_TV = logits_TV.clone().requires_grad_()
        total, _ = compute(x_TV)
        total.backward()
        values.append(total.item())
        grads.append(x_TV.grad)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert (grads[1] - grads[0]).abs().max() < 1e-7


def test_more_tokens_come_closer_to_the_exact_loss_from_below() -> None:
    logits_TV, labels_T, donor_TV = sample(60, 33, 0.0, 1)
    found = []
    for k in (1, 4, 16, 33):
        said = keep_top(donor_TV, k)
        _, parts = top_k_losses(logits_TV, labels_T, *said, lm_weight=0.0, distill_weight=1.0)
        found.append(parts.distill.item())
    assert found == sorted(found) and 0 < found[0] < found[-2] < found[-1]


def test_a_model_that_is_certain_gives_finite_numbers() -> None:
    """The rest has probability 0 in fp32, and the teacher gives it some."""
    logits_TV, labels_T = torch.zeros(3, 8), torch.ones(3, dtype=torch.long)
    logits_TV[:, 1] = 1000.0
    said = keep_top(torch.zeros(3, 8), 2)
    logits_TV.requires_grad_()
    total, _ = top_k_losses(logits_TV, labels_T, *said, lm_weight=1.0, distill_weight=1.0)
    total.backward()
    assert total.isfinite() and logits_TV.grad is not None and logits_TV.grad.isfinite().all()


def test_what_is_kept_sums_to_one() -> None:
    ids_TK, logp_TL = keep_top(3 * torch.randn(300, 50), 7)
    assert ids_TK.shape == (300, 7) and logp_TL.shape == (300, 8)
    assert (logp_TL.exp().sum(-1) - 1).abs().max() < 1e-5
    _, whole_TL = keep_top(torch.randn(4, 9), 9)
    assert (whole_TL[:, -1] == -torch.inf).all()
