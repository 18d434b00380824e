"""Each loss beside its formula, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_tools.experts.conversion import Conversion, divided, write_conversion
from moe_tools.experts.division import Division
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.importance import Importance
from moe_tools.experts.routing import record_routing
from moe_tools.experts.selectors import Selector, Threshold, TopK
from moe_tools.hosts.ffn import find_ffns, unfused_ffns
from moe_tools.hosts.moe_host import unfuse_experts
from moe_tools.training.losses import (
    LOSSES,
    SEPARABILITY_MARGIN,
    Observed,
    clamped,
    compute_losses,
    distill_ffn,
    efficiency,
    group_hoyer,
    hoyer,
    l1,
    load_balance,
    needs_donor,
    seen_kinds,
    separability,
)
from moe_tools.training.watch import watch_ffns
from tests.families import NEURONS, THRESHOLD, build, model_inputs, routed

HALF = Threshold(0.5)


def observed(*scores: Tensor, selector: Selector = HALF, shared: int = 0) -> Observed:
    """What routers with these scores showed."""
    return Observed(
        [
            Routing(str(i), s, s > 0.5, Division(NEURONS, s.shape[-1]), shared, selector)
            for i, s in enumerate(scores)
        ]
    )


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


def test_separability_pushes_from_the_threshold_of_the_selector() -> None:
    scores = torch.tensor([[0.2, 0.1, 0.3]], requires_grad=True)
    separability(observed(scores, selector=Threshold(0.2))).backward()
    assert scores.grad is not None
    at, below, above = scores.grad[0].tolist()
    assert at == 0 and below > 0 > above  # descent pushes away from 0.2, where 0.5 is above all
    best = observed(torch.tensor([[0.1, 0.8, 0.4]]), selector=TopK(2))  # the second best decides
    margin = SEPARABILITY_MARGIN**2
    expected = (1 / (0.09 + margin) + 1 / (0.16 + margin) + 1 / margin) / 3
    assert separability(best).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [efficiency, separability, load_balance])
def test_shared_experts_have_no_say(loss) -> None:
    """Their scores are always 1: they would dilute both losses of LTE."""
    scores = torch.rand(4, 3)
    with_shared = nn.functional.pad(scores, (2, 0), value=1.0)
    assert loss(observed(with_shared, shared=2)).item() == loss(observed(scores)).item()


def test_load_balance_by_hand() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.4, 1.2]], requires_grad=True)
    seen = observed(scores, selector=TopK(1))  # > 0.5: the first expert, then the third
    parts = ((0.6 + 0.2) / 2, (0.3 + 0.2) / 2, (0.1 + 0.6) / 2)
    assert load_balance(seen).item() == pytest.approx(3 * (parts[0] + parts[2]) / 2)
    load_balance(seen).backward()
    assert scores.grad is not None and (scores.grad[:, 1] < 0).all()  # the idle one is to rise


def test_load_balance_is_mixtral_s_but_for_k() -> None:
    logits_TR = torch.randn(40, 6)
    scores_TR = logits_TR.softmax(-1)
    routing = observed(scores_TR).routings[0]._replace(mask_TE=TopK(2)(scores_TR))
    theirs = load_balancing_loss_func((logits_TR,), 6, 2)
    assert load_balance(Observed([routing])).item() == pytest.approx(float(theirs) / 2, rel=1e-5)


def test_load_balance_is_one_for_experts_that_are_as_busy() -> None:
    assert load_balance(observed(torch.full((4, 6), 0.7))).item() == pytest.approx(1)


def test_load_balance_leaves_padding_out() -> None:
    scores = torch.rand(2, 5, 3)
    valid_T = torch.tensor([[False, True, True, True, True], [True] * 5])
    routing = observed(scores).routings[0]._replace(valid_T=valid_T)
    alone = observed(scores[valid_T])
    assert load_balance(Observed([routing])).item() == pytest.approx(load_balance(alone).item())


def test_a_routing_knows_its_selector_and_its_shared_experts() -> None:
    conversion = replace(THRESHOLD, shared_experts=2, selector={"kind": "threshold", "tau": 0.3})
    model, ffns = routed(build("llama"), conversion)
    with record_routing(model) as routings:
        model(**model_inputs(model))
    for routing, ffn in zip(routings, ffns, strict=True):
        assert (routing.shared, routing.selector) == (2, Threshold(0.3))
        assert torch.equal(routing.scores_TR, routing.scores_TE[..., 2:])
        assert (routing.threshold_T1 == 0.3).all() and ffn.shared == 2


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


def outputs(*y: Tensor) -> dict[str, Tensor]:
    return {f"layers.{index}": y_TD for index, y_TD in enumerate(y)}


def test_distill_ffn_by_hand() -> None:
    y = outputs(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]]))
    donor = outputs(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
    loss = distill_ffn(Observed([], y, donor))
    assert loss.item() == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_distill_ffn_pairs_by_name() -> None:
    y = outputs(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]]))
    backwards = dict(reversed(y.items()))
    assert distill_ffn(Observed([], y, backwards)).item() == 0


def test_distill_ffn_does_not_see_the_scale_of_a_layer() -> None:
    y, donor = torch.randn(5, 4), torch.randn(5, 4)
    once = distill_ffn(Observed([], outputs(y), outputs(donor)))
    scaled = distill_ffn(Observed([], outputs(1000 * y), outputs(1000 * donor)))
    assert scaled.item() == pytest.approx(once.item(), rel=1e-5)
    assert distill_ffn(Observed([], outputs(donor), outputs(donor))).item() == 0


def test_a_donor_ffn_that_says_nothing_is_no_division_by_zero() -> None:
    y = torch.zeros(2, 3, requires_grad=True)
    loss = distill_ffn(Observed([], outputs(y), outputs(torch.zeros(2, 3))))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(y.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [efficiency, separability, load_balance])
def test_gradients_are_numerically_right(loss) -> None:
    scores = scores_of((3, 4), (2, 5))
    assert torch.autograd.gradcheck(lambda *s: loss(observed(*s)), scores)


def test_every_loss_has_one_home() -> None:
    assert set(LOSSES) >= {"efficiency", "separability", "distill_ffn", "l1", "hoyer", "clamped"}
    assert {name for name, loss in LOSSES.items() if loss.compute is None} == {"lm", "distill"}
    assert {name for name in LOSSES if needs_donor([name])} == {"distill", "distill_ffn"}
    with pytest.raises(ValueError, match="unknown loss 'eficiency'; did you mean 'efficiency'"):
        _ = LOSSES["eficiency"]


# --- losses of activations


def test_l1_by_hand() -> None:
    seen = Observed(hidden_TF=[torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[-3.0]])])
    assert l1(seen).item() == pytest.approx(((3 + 4) / 2 + 3) / 2)


def test_hoyer_by_hand() -> None:
    seen = Observed(hidden_TF=[torch.tensor([[3.0, -4.0], [0.0, 5.0]]), torch.tensor([[2.0, 2.0]])])
    assert hoyer(seen).item() == pytest.approx(((49 / 25 + 1) / 2 + 2) / 2)
    assert hoyer(Observed(hidden_TF=[torch.ones(2, 7)])).item() == pytest.approx(7)


def experts_of_two() -> Importance:
    """Two experts of two neurons; the second neuron's down row counts twice."""
    return Importance(Division(4, 2), 0, torch.tensor([[1.0], [2.0], [1.0], [1.0]]))


def test_group_hoyer_by_hand() -> None:
    h_TF = torch.tensor([[3.0, 2.0, 0.0, 0.0], [3.0, -2.0, 5.0, 0.0], [3.0, 2.0, 12.0, 5.0]])
    sizes = [(5, 0), (5, 5), (5, 13)]
    expected = sum((a + b) ** 2 / (a * a + b * b) for a, b in sizes) / 3
    seen = Observed(hidden_TF=[h_TF], experts=[experts_of_two()])
    assert group_hoyer(seen).item() == pytest.approx(expected, rel=1e-4)
    scaled = Observed(hidden_TF=[1000 * h_TF], experts=[experts_of_two()])
    assert group_hoyer(scaled).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_group_hoyer_pairs_h_with_the_experts_of_its_own_ffn(family: str) -> None:
    """A host may call its shared expert before those that it lists first."""
    model = build(family)
    unfuse_experts(model)
    write_conversion(model, Conversion("donor", 4))
    downs = {ffn.name: ffn.weights().down_FD for ffn in unfused_ffns(model)}
    with watch_ffns(model, {"hidden"}) as seen, torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None])
    assert sorted(seen.hidden_of) == sorted(downs)
    found = divided(model)
    for name in seen.hidden_of:
        assert torch.equal(found[name].down_FD, downs[name])


def test_group_hoyer_has_a_finite_gradient_where_nothing_fires() -> None:
    h_TF = torch.zeros(2, 4, requires_grad=True)
    group_hoyer(Observed(hidden_TF=[h_TF], experts=[experts_of_two()])).backward()
    assert torch.isfinite(h_TF.grad).all()


def test_hoyer_does_not_see_the_scale_and_is_finite_at_zero() -> None:
    h_TF = torch.randn(5, 4)
    once = hoyer(Observed(hidden_TF=[h_TF])).item()
    assert hoyer(Observed(hidden_TF=[1000 * h_TF])).item() == pytest.approx(once, rel=1e-5)
    silent_TF = torch.zeros(2, 3, requires_grad=True)
    loss = hoyer(Observed(hidden_TF=[silent_TF]))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(silent_TF.grad).all()  # type: ignore[arg-type]


def test_clamped_by_hand() -> None:
    seen = Observed(pre_TF=[torch.tensor([[1.0, -12.0], [-10.0, -9.5]]), torch.tensor([[0.0]])])
    assert clamped(seen).item() == pytest.approx((11.5 / 2 + 10) / 2)


@pytest.mark.parametrize("loss", [l1, hoyer, clamped])
def test_every_ffn_weighs_alike_whatever_its_leading_dimensions(loss) -> None:
    one, other = torch.randn(6, 4), torch.randn(2, 5)
    key = "pre_TF" if loss is clamped else "hidden_TF"
    parts = [loss(Observed(**{key: [h_TF]})) for h_TF in (one, other)]
    both = loss(Observed(**{key: [one.view(2, 3, 4), other]}))
    assert both.item() == pytest.approx(sum(parts).item() / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [l1, hoyer, clamped])
def test_losses_of_activations_are_in_fp32(loss) -> None:
    low_TF = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    exact = loss(Observed(hidden_TF=[low_TF.double()], pre_TF=[low_TF.double()]))
    value = loss(Observed(hidden_TF=[low_TF], pre_TF=[low_TF]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["distill_ffn", "l1", "hoyer", "clamped"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5-gated"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_gradients_arrive_at_the_weights_before(name: str, family: str, sparse: bool) -> None:
    donor = build(family)
    model = routed(donor)[0] if sparse else donor
    with watch_ffns(model, seen_kinds([name])) as ffns:
        model(**model_inputs(model))
    seen = Observed(
        outputs_TD=ffns.outputs,
        donor_outputs_TD={name: torch.randn_like(y) for name, y in ffns.outputs.items()},
        hidden_TF=ffns.hidden,
        pre_TF=ffns.pre,
    )
    compute_losses([name], seen)[name].backward()
    for ffn in expert_ffns(model) or find_ffns(model):
        projections = ffn.projections
        first = projections.up if projections.gate is None else projections.gate
        assert first.weight.grad is not None and first.weight.grad.count_nonzero() > 0, ffn.name
    last = ffn.projections.down.weight.grad  # the last FFN of all: only its output sees it
    assert (last is not None) == (name == "distill_ffn")
