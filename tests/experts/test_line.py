"""One line for all routers moves: the stated share is met, the order of scores stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.line import check_movable, distances_of, move_line, sample_distances
from moe_tools.experts.routing import record_routing, routing_sparsity
from moe_tools.experts.selectors import Threshold
from tests.families import (
    EXPERT_SIZE,
    NEURONS,
    UNEVEN,
    build,
    of_size,
    per_neuron,
    randomize,
    routed,
    sparsity,
)

ROUNDS = 3
"""An FFN's mask moves the inputs of those above it, so one shift alone misses."""


@torch.no_grad()
def trim(model: PreTrainedModel, sparsity: float, blocks_BT: Tensor) -> None:
    """Shifts the routers, as a train step does, until `sparsity` of the experts are off."""
    check_movable(model)
    for _ in range(ROUNDS):
        found = []
        for block_BT in blocks_BT.split(1):
            with record_routing(model) as routings:
                model(input_ids=block_BT)
            found.append(sample_distances(model, routings))
        move_line(model, torch.cat(found), sparsity)


def text(rows: int = 12, length: int = 48) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(4))


def converted(selector: dict[str, float | str] | None = None) -> PreTrainedModel:
    spec = selector or {"kind": "threshold", "tau": 0.5}
    model, _ = routed(build("llama"), Conversion("donor", EXPERT_SIZE, "sigmoid", spec))
    randomize(model)
    return model


@pytest.mark.parametrize("tau", [0.5, 0.2])
@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_the_target_is_reached_within_a_point(target: float, tau: float) -> None:
    model = converted({"kind": "threshold", "tau": tau})
    trim(model, target, text())
    assert sparsity(model, text()) == pytest.approx(target, abs=0.01)


def test_an_ffn_that_moves_the_scores_of_the_next_is_followed() -> None:
    """One shift would miss: what is off below changes what is seen above."""
    model = converted()
    first, second = expert_ffns(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        first.down.weight.mul_(10.0)
        first.down.bias.zero_()
        second.router.weight.mul_(3.0)
        for ffn in (first, second):
            ffn.router.bias.add_(6.0)
    trim(model, 0.9, text(48))
    assert sparsity(model, text(48)) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("experts", [7, 14])
def test_every_expert_counts_whatever_their_number(experts: int) -> None:
    """Every 7th score is sampled: with 7 experts, that must not be always the same one."""
    donor = build("llama", intermediate_size=EXPERT_SIZE * experts)
    model, ffns = routed(donor)
    randomize(model)
    with torch.no_grad():
        for ffn in ffns:
            ffn.router.bias[::7] += 4.0
    trim(model, 0.5, text(48))
    assert sparsity(model, text(48)) == pytest.approx(0.5, abs=0.01)


def test_every_bias_moves_by_the_same_and_nothing_else_does() -> None:
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trim(model, 0.7, text())
    shifts = []
    for name, tensor in model.state_dict().items():
        if name.endswith("router.bias"):
            shifts.append(tensor - before[name])
        else:
            assert torch.equal(tensor, before[name])
    assert len(shifts) == 2
    moved = torch.cat(shifts)
    assert (moved - moved[0]).abs().max() < 1e-5
    assert moved[0].abs() > 0.1


def test_trimming_twice_changes_little() -> None:
    model = converted()
    trim(model, 0.4, text())
    once = [ffn.router.bias.detach().clone() for ffn in expert_ffns(model)]
    trim(model, 0.4, text())
    for ffn, was in zip(expert_ffns(model), once, strict=True):
        assert (ffn.router.bias - was).abs().max() < 0.05


def test_a_shift_takes_the_share_of_the_sample_below_zero() -> None:
    model = converted()
    logits_S = torch.linspace(-1.0, 3.0, 401)
    before = expert_ffns(model)[0].router.bias.detach().clone()
    move_line(model, logits_S, 0.25)
    assert (expert_ffns(model)[0].router.bias - before).tolist() == pytest.approx(
        [0.0] * len(before), abs=0.02
    )
    move_line(model, logits_S, 0.5, damping=0.5)
    assert (expert_ffns(model)[0].router.bias - before).tolist() == pytest.approx(
        [-0.5] * len(before), abs=0.02
    )


@pytest.mark.parametrize(
    ("logits", "share", "shift"),
    [
        ([1.0] * 40 + [2.0] * 60, 0.5, -1.5),  # of 40% and 100%, 40% is nearer
        ([1.0] * 40 + [2.0] * 60, 0.8, -3.0),  # 100% is nearer: all are off, clearly
        ([2.0] * 100, 0.3, -1.0),  # none is off: the line lies below them all, clearly
        ([2.0] * 100, 0.0, -1.0),
        ([-8.0] * 40 + [8.0] * 60, 0.4, 0.0),  # it is there already
        ([-8.0] * 40 + [8.0] * 60, 0.41, 0.0),
        ([0.0, 1.0, 2.0, 3.0], 0.5, -1.5),
    ],
)
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_equal_scores_are_on_one_side_of_the_line(
    logits: list[float], share: float, shift: float, damping: float
) -> None:
    """One constant cannot part them: the nearer share is taken, and no score is on the line."""
    model = converted()
    before = expert_ffns(model)[0].router.bias.detach().clone()
    order = torch.randperm(len(logits))
    move_line(model, torch.tensor(logits)[order], share, damping=damping)
    moved = expert_ffns(model)[0].router.bias - before
    assert moved.tolist() == pytest.approx([damping * shift] * len(before), abs=1e-6)


@pytest.mark.parametrize("target", [0.02, 0.3, 0.49])
def test_routers_that_score_all_alike_do_not_all_go_off(target: float) -> None:
    """As a start that has every expert on: one shift too far would leave nothing."""
    model = converted()
    with torch.no_grad():
        for ffn in expert_ffns(model):
            ffn.router.weight.zero_()
            ffn.router.bias.fill_(4.6)
    trim(model, target, text())
    assert sparsity(model, text()) == 0


def test_scores_at_the_ends_stay_finite() -> None:
    """A score of exactly 1 has no logit."""
    model, _ = routed(build("llama"))
    with record_routing(model) as routings, torch.no_grad():
        model(input_ids=text())
    logits_S = sample_distances(model, routings)
    assert all(bool((routing.scores_TE == 1).all()) for routing in routings)
    assert torch.isfinite(logits_S).all()


@pytest.mark.parametrize("passes", [1, 4, 2048])
def test_many_passes_share_a_sample(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_tools.experts.line.SAMPLE", 8192)
    model = converted()
    with record_routing(model) as routings, torch.no_grad():
        model(input_ids=text(32, 64))
    ffns = expert_ffns(model)
    scores = 32 * 64 * sum(ffn.division.num_experts for ffn in ffns)
    taken = len(sample_distances(model, routings, passes))
    assert 0 <= taken - min(scores, 8192 // passes) < len(ffns)


def test_top_k_has_no_line_to_move() -> None:
    model = converted({"kind": "topk", "k": 2})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp: a target sparsity needs a threshold; .*top-k"
    ):
        trim(model, 0.5, text())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_dense_model_has_nothing_to_trim() -> None:
    with pytest.raises(ValueError, match="has no routed FFN"):
        trim(build("llama"), 0.5, text())


@pytest.mark.parametrize(("shared", "target"), [(1, 0.3), (1, 0.7), (2, 0.4)])
@pytest.mark.parametrize("size", [EXPERT_SIZE, UNEVEN])
def test_shared_experts_count_as_neurons_that_stay_on(
    shared: int, target: float, size: int
) -> None:
    model, _ = routed(build("llama"), replace(of_size(size), shared_experts=shared))
    randomize(model)
    trim(model, target, text())
    with record_routing(model) as routings, torch.no_grad():
        model(input_ids=text())
    off = sum(int((~per_neuron(routing.mask_TE, size)).sum()) for routing in routings)
    assert off / sum(r.mask_TE[..., 0].numel() * NEURONS for r in routings) == pytest.approx(
        target, abs=0.015
    )
    assert all(routing.mask_TE[..., :shared].all() for routing in routings)
    assert routing_sparsity(routings) == pytest.approx(1 - neurons_on(routings, size), abs=1e-9)


def neurons_on(routings: list[Routing], size: int) -> float:
    """Share of neurons on, counted one by one."""
    on = [per_neuron(routing.mask_TE, size).flatten() for routing in routings]
    return torch.cat(on).double().mean().item()


@pytest.mark.parametrize("router", ["mlp", "norm", "oracle", "cats", "few_bits"])
def test_scores_of_a_ratio_scale_move_by_one_ratio_of_all_thresholds(router: str) -> None:
    model = build("llama")
    attach_experts(model, Conversion("donor", EXPERT_SIZE, router, {"kind": "threshold"}))
    first, second = expert_ffns(model)
    first.selector, second.selector = Threshold(0.02), Threshold(0.01)  # as a budget leaves them
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trim(model, 0.5, text())
    assert sparsity(model, text()) == pytest.approx(0.5, abs=0.03)
    assert first.selector.tau / second.selector.tau == pytest.approx(2.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.2, 1.5])
@pytest.mark.parametrize("router", ["sigmoid", "bottleneck"])
def test_a_threshold_without_a_logit_is_refused_and_no_bias_is_spoilt(
    router: str, tau: float
) -> None:
    model = build("llama")
    spec = {"kind": "threshold", "tau": tau}
    attach_experts(model, Conversion("donor", EXPERT_SIZE, router, spec))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"and tau is {tau:g}: set it between, e.g. at 0.5"):
        trim(model, 0.5, text())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_ffn_counts_by_the_tokens_that_it_saw() -> None:
    """Experts of an MoE host see as many as the host gives them: one share for all."""
    model = converted()
    first, second = expert_ffns(model)
    experts = first.division.num_experts
    seen = {
        first.name: torch.full((4000, experts), 0.9),
        second.name: torch.full((40, experts), 0.1),
    }
    distance_S = distances_of([first, second], seen, most=404 * experts)
    assert (distance_S > 0).sum() == 400 * experts and (distance_S < 0).sum() == 4 * experts


def test_the_first_token_of_a_block_counts_as_one() -> None:
    """Of every 16th token a quarter would be such: a line set on them would be another one."""
    model = converted()
    ffns = expert_ffns(model)
    experts = ffns[0].division.num_experts
    score_T = torch.where(torch.arange(32 * 64) % 64 == 0, 0.1, 0.9)
    seen = {ffn.name: score_T[:, None].expand(-1, experts) for ffn in ffns}
    for tokens in (128, 1000, 2048):
        distance_S = distances_of(ffns, seen, most=tokens * experts * len(ffns))
        assert (distance_S < 0).double().mean() == pytest.approx(1 / 64, abs=0.006)


def test_scores_without_ratios_cannot_move() -> None:
    model = build("llama")
    attach_experts(model, Conversion("donor", EXPERT_SIZE, "similarity", {"kind": "threshold"}))
    with pytest.raises(ValueError, match="SimilarityRouter has neither"):
        trim(model, 0.5, text())


def test_a_threshold_of_zero_is_not_moved_by_a_ratio() -> None:
    model = build("llama")
    spec = {"kind": "threshold", "tau": 0.0}
    attach_experts(model, Conversion("donor", EXPERT_SIZE, "cats", spec))
    with pytest.raises(ValueError, match="tau is 0: a `budget` by itself"):
        trim(model, 0.5, text())
