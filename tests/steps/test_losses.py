"""Each loss beside its formula, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.model.routing import Routing
from moe_tools.steps.losses import (
    DONOR_LOSSES,
    LOGIT_LOSSES,
    LOSSES,
    SEPARABILITY_MARGIN,
    Observed,
    distill_ffn,
    efficiency,
    separability,
)


def observed(*scores: Tensor) -> Observed:
    return Observed([Routing(str(i), s, s > 0.5) for i, s in enumerate(scores)], [], [])


def scores_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.rand(shape, dtype=torch.double).requires_grad_() for shape in shapes]


def test_efficiency_by_hand() -> None:
    seen = observed(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.2]]))
    assert efficiency(seen).item() == pytest.approx(((1 + 0 + 0.25 + 0.25) / 4 + 0.04) / 2)


def test_efficiency_weighs_every_ffn_alike() -> None:
    one, other = scores_of((7, 3), (2, 5, 6))
    efficiency(observed(one, other)).backward()
    assert torch.allclose(one.grad, one / one.numel())  # type: ignore[arg-type]
    assert torch.allclose(other.grad, other / other.numel())  # type: ignore[arg-type]


def test_separability_by_hand() -> None:
    margin = SEPARABILITY_MARGIN**2
    seen = observed(torch.tensor([[0.5, 0.9]]), torch.tensor([[0.0]]))
    first = (1 / margin + 1 / (0.16 + margin)) / 2
    assert separability(seen).item() == pytest.approx((first + 1 / (0.25 + margin)) / 2, rel=1e-6)
    shifted = observed(torch.tensor([[0.2]]))
    assert separability(shifted, tau=0.2).item() == pytest.approx(1 / margin)


def test_separability_is_the_paper_s_far_from_tau() -> None:
    scores = torch.tensor([[0.02, 0.97]], dtype=torch.double)
    paper = ((scores - 0.5) ** -2).mean()
    assert separability(observed(scores)).item() == pytest.approx(paper.item(), rel=0.05)


def test_separability_is_finite_at_tau_and_so_is_its_gradient() -> None:
    scores = torch.tensor([[0.5, 0.5 + 1e-8, 0.4, 0.6]], requires_grad=True)
    loss = separability(observed(scores))
    loss.backward()
    assert 0 < loss.item() <= 1 / SEPARABILITY_MARGIN**2
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert scores.grad[0, 0] == 0
    assert scores.grad[0, 2] > 0 > scores.grad[0, 3]  # descent pushes away from tau


def test_distill_ffn_by_hand() -> None:
    y = [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]])]
    donor = [torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]])]
    loss = distill_ffn(Observed([], y, donor))
    assert loss.item() == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_distill_ffn_does_not_see_the_scale_of_a_layer() -> None:
    y, donor = torch.randn(5, 4), torch.randn(5, 4)
    once = distill_ffn(Observed([], [y], [donor]))
    assert distill_ffn(Observed([], [1000 * y], [1000 * donor])).item() == pytest.approx(
        once.item(), rel=1e-5
    )
    assert distill_ffn(Observed([], [donor], [donor])).item() == 0


def test_a_donor_ffn_that_says_nothing_is_no_division_by_zero() -> None:
    y = torch.zeros(2, 3, requires_grad=True)
    loss = distill_ffn(Observed([], [y], [torch.zeros(2, 3)]))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(y.grad).all()  # type: ignore[arg-type]


def test_distill_ffn_needs_as_many_outputs_of_both() -> None:
    with pytest.raises(ValueError, match="zip"):
        distill_ffn(Observed([], [torch.ones(1, 1)], []))


@pytest.mark.parametrize("loss", [efficiency, separability])
def test_gradients_are_numerically_right(loss) -> None:
    scores = scores_of((3, 4), (2, 5))
    assert torch.autograd.gradcheck(lambda *s: loss(observed(*s)), scores)


def test_every_loss_has_one_home() -> None:
    assert set(LOSSES) == {"efficiency", "separability", "distill_ffn"}
    assert not set(LOSSES) & set(LOGIT_LOSSES)
    assert set(DONOR_LOSSES) <= {*LOSSES, *LOGIT_LOSSES}
    with pytest.raises(ValueError, match="unknown loss 'eficiency'; did you mean 'efficiency'"):
        _ = LOSSES["eficiency"]
