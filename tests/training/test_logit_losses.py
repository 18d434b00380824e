"""The fused losses against PyTorch's own: value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moe_tools.names import IGNORE
from moe_tools.training.logit_losses import ROWS, logit_losses


def reference(
    logits_TV: Tensor, labels_T: Tensor, donor_TV: Tensor | None, lm: float, distill: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp64."""
    cross = functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE)
    if donor_TV is None:
        return lm * cross, cross, torch.zeros(())
    kept = labels_T != IGNORE
    apart = functional.kl_div(
        logits_TV[kept].log_softmax(-1),
        donor_TV[kept].log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return lm * cross + distill * apart, cross, apart


def sample(
    tokens: int, vocabulary: int, ignored: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits_TV = 3 * torch.randn(tokens, vocabulary, generator=draw)
    donor_TV = logits_TV + torch.randn(tokens, vocabulary, generator=draw)
    labels_T = torch.randint(vocabulary, (tokens,), generator=draw)
    labels_T[torch.rand(tokens, generator=draw) < ignored] = IGNORE
    labels_T[seed % tokens] = seed % vocabulary  # one label at least
    return logits_TV, labels_T, donor_TV


WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 2.0])


@given(
    tokens=st.integers(1, 2 * ROWS + 3),
    vocabulary=st.integers(2, 33),
    ignored=st.sampled_from([0.0, 0.3, 0.95]),
    with_donor=st.booleans(),
    lm=WEIGHTS,
    distill=WEIGHTS,
    seed=st.integers(0, 999),
)
@example(2 * ROWS, 7, 0.0, True, 1.0, 1.0, 0)
@example(2 * ROWS + 1, 7, 0.95, True, 1.0, 1.0, 0)
@example(1, 2, 0.0, True, 0.0, 0.0, 0)
@example(5, 3, 0.3, False, 0.0, 1.0, 1)
def test_values_and_gradient_are_those_of_autograd(
    tokens: int,
    vocabulary: int,
    ignored: float,
    with_donor: bool,
    lm: float,
    distill: float,
    seed: int,
) -> None:
    logits_TV, labels_T, donor_TV = sample(tokens, vocabulary, ignored, seed)
    given_donor = donor_TV if with_donor else None
    mine = logits_TV.requires_grad_()
    total, parts = logit_losses(mine, labels_T, given_donor, lm_weight=lm, distill_weight=distill)
    total.backward()
    theirs = logits_TV.detach().double().requires_grad_()
    expected, cross, apart = reference(
        theirs, labels_T, donor_TV.double() if with_donor else None, lm, distill
    )
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
    assert parts.lm.item() == pytest.approx(cross.item(), abs=1e-5, rel=1e-5)
    assert parts.distill.item() == pytest.approx(apart.item(), abs=1e-5, rel=1e-5)
    assert mine.grad is not None and theirs.grad is not None
    assert (mine.grad - theirs.grad).abs().max() < 1e-6


def test_an_ignored_row_gets_no_gradient() -> None:
    logits_TV, labels_T, donor_TV = sample(20, 5, 0.5, seed=3)
    logits_TV.requires_grad_()
    logit_losses(logits_TV, labels_T, donor_TV, lm_weight=1, distill_weight=1)[0].backward()
    assert logits_TV.grad is not None
    assert (logits_TV.grad[labels_T == IGNORE] == 0).all()
    assert (logits_TV.grad[labels_T != IGNORE] != 0).any(-1).all()


def test_the_gradient_follows_what_comes_after() -> None:
    """As under gradient accumulation: the loss is divided before the backward pass."""
    logits_TV, labels_T, donor_TV = sample(20, 5, 0.0, seed=4)
    grads = []
    for divisor in (1.0, 4.0):
        logits = logits_TV.clone().requires_grad_()
        total, _ = logit_losses(logits, labels_T, donor_TV, lm_weight=1, distill_weight=1)
        (total / divisor).backward()
        grads.append(logits.grad)
    assert torch.equal(grads[0] / 4, grads[1])


def test_a_donor_that_agrees_leaves_the_language_loss() -> None:
    logits_TV, labels_T, _ = sample(20, 5, 0.0, seed=5)
    mine = logits_TV.clone().requires_grad_()
    total, parts = logit_losses(mine, labels_T, logits_TV, lm_weight=1, distill_weight=1)
    total.backward()
    alone = logits_TV.clone().requires_grad_()
    logit_losses(alone, labels_T, None, lm_weight=1, distill_weight=0)[0].backward()
    assert abs(parts.distill.item()) < 1e-6
    assert (mine.grad - alone.grad).abs().max() < 1e-7  # type: ignore[operator]


def test_bf16_logits_lose_only_the_rounding_of_their_own_gradient() -> None:
    logits_TV, labels_T, donor_TV = sample(2 * ROWS + 5, 32, 0.1, seed=6)
    low = logits_TV.bfloat16().requires_grad_()
    total, _ = logit_losses(low, labels_T, donor_TV.bfloat16(), lm_weight=1, distill_weight=1)
    total.backward()
    exact = low.detach().double().requires_grad_()
    expected, *_ = reference(exact, labels_T, donor_TV.bfloat16().double(), 1, 1)
    expected.backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert exact.grad is not None
    assert ((low.grad - exact.grad).abs() <= exact.grad.abs() / 128 + 1e-9).all()


def test_extreme_logits_stay_finite() -> None:
    logits_TV = torch.tensor([[1e4, -1e4, 0.0], [0.0, 80.0, -80.0]], requires_grad=True)
    donor_TV = torch.tensor([[-1e4, 1e4, 0.0], [0.0, -80.0, 80.0]])
    labels_T = torch.tensor([0, 1])
    total, _ = logit_losses(logits_TV, labels_T, donor_TV, lm_weight=1, distill_weight=1)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(logits_TV.grad).all()  # type: ignore[arg-type]


def test_of_no_label_there_is_no_mean() -> None:
    """Whether there is one is asked where labels are on the host, not of the device."""
    logits_TV, labels_T, _ = sample(4, 3, 0.0, seed=7)
    none_T = torch.full_like(labels_T, IGNORE)
    total, parts = logit_losses(logits_TV, none_T, None, lm_weight=1, distill_weight=0)
    assert torch.isnan(total) and torch.isnan(parts.lm)


@pytest.mark.parametrize("with_donor", [False, True])
def test_nothing_is_read_of_the_device(with_donor: bool) -> None:
    """Tensors without numbers: to read one is an error."""
    logits_TV, labels_T, donor_TV = (part.to("meta") for part in sample(2 * ROWS + 3, 9, 0.3, 1))
    logits_TV.requires_grad_()
    donor = donor_TV if with_donor else None
    logit_losses(logits_TV, labels_T, donor, lm_weight=1, distill_weight=1)[0].backward()
    assert logits_TV.grad is not None


def test_nan_logits_give_a_nan_loss() -> None:
    logits_TV, labels_T, _ = sample(4, 3, 0.0, seed=8)
    logits_TV[2, 1] = torch.nan
    total, _ = logit_losses(logits_TV, labels_T, None, lm_weight=1, distill_weight=0)
    assert torch.isnan(total)
