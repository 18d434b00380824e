"""The swap step: the block it writes, and thresholds that keep to their bound."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, read_conversion
from moe_tools.hosts.ffn import find_ffns
from moe_tools.recipe import Split, Swap
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.split import split
from moe_tools.steps.swap import ROUNDS, calibrate_thetas, swap
from tests.families import build, logits, said

DONOR = Conversion("donor")
RELU = Swap({"kind": "relu"})
BOUND = 0.05
CALIBRATED = Swap({"kind": "fatrelu"}, max_error=BOUND)


def text(rows: int = 8, length: int = 16) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def relu_model(family: str) -> PreTrainedModel:
    model = build(family)
    swap(model, RELU, DONOR, text())
    return model


def errors_at(model: PreTrainedModel, thetas: list[float]) -> list[float]:
    """||y - y_theta||^2 / ||y||^2 of every FFN, from tokens that are all kept."""
    seen: list[list[Tensor]] = [[] for _ in thetas]
    visit_activations(model, text(), lambda index, x_TD, _: seen[index].append(x_TD))
    found = []
    for ffn, x, theta in zip(find_ffns(model), seen, thetas, strict=True):
        x_TD, weights = torch.cat(x), ffn.weights()
        up_TF = torch.nn.functional.linear(x_TD, weights.up_FD, weights.up_F)
        gate_TF = up_TF
        if weights.gate_FD is not None:
            gate_TF = torch.nn.functional.linear(x_TD, weights.gate_FD, weights.gate_F)
        ones_TF = torch.ones_like(up_TF) if weights.gate_FD is None else up_TF
        whole_TD = (gate_TF.relu() * ones_TF) @ weights.down_FD
        cut_TD = (torch.where(gate_TF >= theta, gate_TF, 0) * ones_TF) @ weights.down_FD
        found.append(float((whole_TD - cut_TD).square().sum() / whole_TD.square().sum()))
    return found


def test_a_swap_adds_to_what_was_done_before() -> None:
    model = build("llama")
    assert swap(model, RELU, replace(DONOR, expert_size=8, shared_experts=1), text()) == {}
    expected = Conversion("donor", 8, shared_experts=1, activation={"kind": "relu"})
    assert said(model) == expected
    assert model.config.hidden_act == "relu"


def test_a_rehearsal_swaps_without_text() -> None:
    model, other = build("llama"), build("llama")
    other.load_state_dict(model.state_dict())
    RELU.rehearse(other, "donor")
    swap(model, RELU, DONOR, text())
    assert torch.equal(logits(model), logits(other))
    assert read_conversion(model) == read_conversion(other)
    CALIBRATED.rehearse(other, "donor")  # chooses no theta


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "mixtral", "qwen2_moe"])
@torch.no_grad()
def test_thetas_are_the_largest_within_the_bound(family: str) -> None:
    model = relu_model(family)
    measured = swap(copy.deepcopy(model), CALIBRATED, DONOR, text())["thetas"]
    ffns = find_ffns(model)
    assert list(measured) == [ffn.name for ffn in ffns]
    thetas = [found["theta"] for found in measured.values()]
    assert all(theta > 0 for theta in thetas) and len(set(thetas)) == len(thetas)
    reached = errors_at(model, thetas)
    assert [found["error"] for found in measured.values()] == pytest.approx(reached, rel=1e-3)
    assert all(0 < error <= BOUND * 1.001 for error in reached)
    # A tenth more, and the bound is broken.
    assert all(error > BOUND for error in errors_at(model, [1.1 * theta for theta in thetas]))


@torch.no_grad()
def test_calibration_changes_nothing_before_the_swap() -> None:
    model = relu_model("llama")
    before = logits(model)
    calibrate_thetas(model, BOUND, text())
    assert torch.equal(logits(model), before)
    assert said(model) == replace(DONOR, activation={"kind": "relu"})


def test_a_calibrated_swap_is_recorded_ffn_by_ffn() -> None:
    model = relu_model("llama")
    so_far = read_conversion(model)
    assert so_far is not None
    measured = swap(model, CALIBRATED, so_far, text())["thetas"]
    made = read_conversion(model)
    assert made is not None and made.activation == {"kind": "fatrelu"}
    thetas = {name: found["theta"] for name, found in measured.items()}
    assert {name: own["theta"] for name, own in made.activation_of.items()} == thetas
    assert {ffn.name: ffn.act.theta for ffn in find_ffns(model)} == thetas
    assert made.stock_activation == "relu"


def test_a_larger_bound_gives_larger_thetas() -> None:
    model = relu_model("llama")
    small, large = (calibrate_thetas(model, bound, text()) for bound in (0.01, 0.2))
    assert all(small[name].theta < large[name].theta for name in small)


def test_thetas_of_a_model_that_has_some_only_grow() -> None:
    model = relu_model("llama")
    first = {name: found.theta for name, found in calibrate_thetas(model, 0.2, text()).items()}
    swap(model, Swap({"kind": "fatrelu"}, max_error=0.2), DONOR, text())
    again = calibrate_thetas(model, 0.01, text())
    assert all(found.theta >= first[name] for name, found in again.items())
    assert all(found.error <= 0.01 for found in again.values())


def test_thetas_do_not_depend_on_the_batches() -> None:
    model = relu_model("llama")
    whole = calibrate_thetas(model, BOUND, text())
    rows = [theta for theta, _ in calibrate_thetas(model, BOUND, text().flip(0)).values()]
    assert [found.theta for found in whole.values()] == pytest.approx(rows, rel=1e-3)
    assert ROUNDS >= 10


@torch.no_grad()
def test_an_ffn_without_output_loses_nothing() -> None:
    model = relu_model("llama")
    find_ffns(model)[0].weights().down_FD.zero_()
    first, second = calibrate_thetas(model, BOUND, text()).values()
    assert first.error == 0 < first.theta
    assert 0 < second.error <= BOUND


def test_a_donor_that_relu_alone_changes_too_much_is_refused() -> None:
    model = build("llama")
    before = logits(model)
    message = (
        r"^model\.layers\.0\.mlp: fatrelu with theta 0 makes an error of \S+, above the max_error "
        "of 0.05: put `swap` to relu and `train` before it$"
    )
    with pytest.raises(ValueError, match=message):
        swap(model, CALIBRATED, DONOR, text())
    assert torch.equal(logits(model), before)
    assert read_conversion(model) is None


def test_a_split_model_swaps_too() -> None:
    model = build("llama")
    split(model, Split(8), text(), seed=0)
    other = copy.deepcopy(model)
    swap(model, RELU, DONOR, text())
    for ffn in find_ffns(other):
        ffn.layer.act_fn = torch.nn.ReLU()
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Swap({"kind": "relu"}, 0.1), "^swap: max_error chooses theta, which relu has not: use f"),
        (Swap({}, 0.1), "^swap: max_error chooses theta, which None has not: use fatrelu$"),
        (
            Swap({"kind": "fatrelu", "theta": 0.1}, 0.1),
            "^swap: max_error chooses theta: give one of the two$",
        ),
        (Swap({"kind": "rellu"}), "^unknown activation 'rellu'; did you mean 'relu'"),
        (Swap({"kind": "fatrelu", "theta": -1}), "^theta is -1, but must be a number of 0 or more"),
    ],
)
def test_a_mistake_changes_nothing(step: Any, message: str) -> None:
    model = relu_model("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        swap(model, step, DONOR, text())
    with pytest.raises(ValueError, match=message):
        step.rehearse(model, "donor")
    assert torch.equal(logits(model), before)
