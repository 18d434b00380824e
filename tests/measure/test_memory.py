"""The formula of ZeRO, against its own worked example and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_tools.measure.memory import STAGES, ModelStates

GB = 1e9


def parameters(count: int, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(count, dtype=dtype, device="meta"))]


@pytest.mark.parametrize(
    ("stage", "processes", "expected"),
    [(0, 64, 120), (1, 64, 31.4), (2, 64, 16.6), (3, 64, 1.88), (1, 4, 52.5), (3, 1024, 0.12)],
)
def test_the_example_of_the_paper(stage: int, processes: int, expected: float) -> None:
    model = parameters(7_500_000_000)  # table 1 and figure 1 of arXiv 1910.02054: 7.5B
    states = ModelStates.of(model, model)
    assert states.per_process(stage, processes) / GB == pytest.approx(
        expected, rel=0.03
    )  # as it rounds


def test_what_is_frozen_or_in_fp32_costs_less() -> None:
    host, routers = parameters(1000), parameters(10, torch.float32)
    states = ModelStates.of([*host, *routers], routers, teacher=2000)
    assert states == ModelStates(weights=2040, gradients=40, optimizer=80, teacher=2000)
    assert ModelStates.of(host).per_process(0, 1) == 2000


@given(
    weights=st.integers(0, 10**12),
    trained=st.integers(0, 10**12),
    processes=st.integers(1, 4096),
)
def test_a_higher_stage_never_needs_more(weights: int, trained: int, processes: int) -> None:
    states = ModelStates(weights, trained, 6 * trained, teacher=weights)
    needs = [states.per_process(stage, processes) for stage in STAGES]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] == 2 * weights + 7 * trained
    assert needs[3] == pytest.approx(weights + (weights + 7 * trained) / processes)


@pytest.mark.parametrize(
    ("stage", "processes", "message"),
    [(4, 1, "stages 0, 1, 2 and 3, not 4"), (1, 0, "^0 processes hold nothing")],
)
def test_mistakes_are_named(stage: int, processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelStates(1).per_process(stage, processes)
