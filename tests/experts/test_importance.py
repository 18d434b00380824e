"""What an expert is worth, each figure against a slow loop over tokens and neurons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.experts.importance import LEAST_ENERGY, Importance
from moe_tools.experts.selectors import Selector
from tests.families import build, every_size, of_size, routed

property_test = settings(deadline=None, max_examples=40, derandomize=True, database=None)
WIDTH = 5


@st.composite
def cases(draw: st.DrawFn) -> tuple[Importance, Tensor]:
    """Experts of any sizes, some of them shared, with a mean or without; and h_TF."""
    neurons = draw(st.integers(1, 17))
    division = Division(neurons, draw(st.integers(1, neurons)))
    shared = draw(st.integers(0, division.num_experts - 1))
    torch.manual_seed(draw(st.integers(0, 99)))
    off_F = torch.randn(neurons).double() if draw(st.booleans()) else None
    importance = Importance(division, shared, torch.randn(neurons, WIDTH).double(), off_F)
    return importance, torch.randn(draw(st.integers(1, 4)), neurons).double()


def moved(importance: Importance, h_TF: Tensor, token: int) -> list[list[tuple[float, Tensor]]]:
    """(h - off, its column of W_down) of every neuron of every routed expert."""
    off_F = torch.zeros(h_TF.shape[1]) if importance.off_F is None else importance.off_F
    experts, start = [], 0
    for size in importance.division.sizes:
        neurons = range(start, start + size)
        experts.append([(float(h_TF[token, n] - off_F[n]), importance.down_FD[n]) for n in neurons])
        start += size
    return experts[importance.shared :]


@given(cases())
@property_test
def test_magnitude_is_the_sum_of_what_neurons_do(case: tuple[Importance, Tensor]) -> None:
    importance, h_TF = case
    for token, row in enumerate(importance.magnitude_TR(h_TF).tolist()):
        expected = [sum(abs(h) for h, _ in neurons) for neurons in moved(importance, h_TF, token)]
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(cases(), st.sampled_from([0.0, 0.1, 0.5]))
@property_test
def test_an_expert_is_non_zero_when_a_neuron_is(
    case: tuple[Importance, Tensor], zero_below: float
) -> None:
    importance, h_TF = case
    h_TF = h_TF.round()  # some are exactly 0
    off_F = 0 if importance.off_F is None else importance.off_F
    for token, row in enumerate(importance.nonzero_TR(h_TF, zero_below).tolist()):
        least = zero_below * float((h_TF[token].float() - off_F).abs().max())
        experts = moved(importance, h_TF, token)
        assert row == [any(abs(h) > least + 1e-6 for h, _ in neurons) for neurons in experts]


@given(cases())
@property_test
def test_energy_weighs_neurons_by_their_way_down(case: tuple[Importance, Tensor]) -> None:
    importance, h_TF = case
    for token, row in enumerate(importance.log_energy_TR(h_TF).exp().tolist()):
        expected = [
            sum(float((h * down_D).square().sum()) for h, down_D in neurons)
            for neurons in moved(importance, h_TF, token)
        ]
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(cases())
@property_test
def test_the_norm_is_that_of_the_experts_output(case: tuple[Importance, Tensor]) -> None:
    importance, h_TF = case
    for token, row in enumerate(importance.norm_TR(h_TF).tolist()):
        expected = [
            float(torch.stack([h * down_D for h, down_D in neurons]).sum(0).norm())
            for neurons in moved(importance, h_TF, token)
        ]
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(cases())
@property_test
def test_the_energy_bounds_the_norm(case: tuple[Importance, Tensor]) -> None:
    importance, h_TF = case
    sizes_R = torch.tensor(importance.division.sizes[importance.shared :])
    bound_TR = (importance.log_energy_TR(h_TF).exp() * sizes_R).sqrt()
    assert (importance.norm_TR(h_TF) <= 1.001 * bound_TR + 1e-3).all()


class Only(Selector):
    """One routed expert and no other."""

    knob = ""

    def __init__(self, expert: int | None) -> None:
        self.expert = expert

    def __call__(self, scores_TR: Tensor) -> Tensor:
        mask_TR = torch.zeros_like(scores_TR, dtype=torch.bool)
        if self.expert is not None:
            mask_TR[..., self.expert] = True
        return mask_TR

    limits_TR = at = None  # type: ignore[assignment]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("off", ["zero", "mean"])
@every_size
@torch.no_grad()
def test_the_norm_is_what_running_the_expert_alone_changes(
    family: str, shared: int, off: str, size: int
) -> None:
    conversion = replace(of_size(size), shared_experts=shared, when_off=off)
    _, (ffn, *_) = routed(build(family), conversion)
    if ffn.off_F is not None:
        ffn.off_F.normal_(std=0.1)
    x_TD = torch.randn(2, 3, 16)
    norm_TR = ffn.importance().norm_TR(ffn.hidden(x_TD))
    assert norm_TR.shape == (2, 3, ffn.division.num_experts - shared)
    ffn.selector = Only(None)
    none_TD = ffn(x_TD)
    for expert in range(norm_TR.shape[-1]):
        ffn.selector = Only(expert)
        alone = (ffn(x_TD) - none_TD).norm(dim=-1)
        torch.testing.assert_close(norm_TR[..., expert], alone, rtol=1e-4, atol=1e-5)


def test_the_energy_of_a_silent_expert_is_finite() -> None:
    importance = Importance(Division(6, 3), 0, torch.ones(6, 4))
    energy_TR = importance.log_energy_TR(torch.zeros(2, 6))
    assert energy_TR.exp().flatten().tolist() == pytest.approx([LEAST_ENERGY] * 6)
    assert (importance.norm_TR(torch.zeros(2, 6)) == 0).all()


def test_figures_are_in_fp32_for_a_bf16_ffn() -> None:
    h_TF, down_FD = torch.randn(7, 10).bfloat16(), torch.randn(10, 4).bfloat16()
    low = Importance(Division(10, 3), 1, down_FD)
    full = Importance(Division(10, 3), 1, down_FD.float())
    for figure in ("magnitude_TR", "log_energy_TR", "norm_TR"):
        value_TR = getattr(low, figure)(h_TF)
        assert value_TR.dtype == torch.float32 and value_TR.shape == (7, 2)
        assert torch.equal(value_TR, getattr(full, figure)(h_TF.float()))


@pytest.mark.parametrize(
    ("neurons", "experts", "shared", "routed_neurons"),
    [(10, 3, 0, 10), (10, 3, 1, 6), (9, 3, 2, 3)],
)
def test_what_a_router_can_turn_off(
    neurons: int, experts: int, shared: int, routed_neurons: int
) -> None:
    importance = Importance(Division(neurons, experts), shared, torch.ones(neurons, 1))
    assert importance.routed == experts - shared
    assert importance.routed_neurons == routed_neurons
