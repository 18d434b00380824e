"""The formula of ZeRO, against its own worked example and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_tools.measure.memory import STAGES, WAYS, ModelStates, largest_layer

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
    assert states == ModelStates(weights=2040, gradients=40, optimizer=80, teacher=2000, numbers=10)
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


# --- sums, teachers, offload


def test_sums_of_several_passes_are_where_the_documentation_says() -> None:
    """The table of docs/training.md, of 1000 parameters and 4 processes."""
    model = parameters(1000)
    once, summed = (ModelStates.of(model, model, summed=each) for each in (False, True))
    assert (once.sums, summed.sums) == (0, 4000)
    more = [summed.per_process(stage, 4) - once.per_process(stage, 4) for stage in STAGES]
    assert more == [2000, 4000, 500, 500]  # 4 for 2; 4 beside 2; 4 for 2, sharded
    exact = parameters(1000, torch.float32)
    assert ModelStates.of(exact, exact, summed=True).sums == 0


def test_a_teacher_is_where_it_is_said_to_be() -> None:
    states = ModelStates(weights=0, teacher=800)
    where = {
        teacher: states.per_process(3, 8, teacher)
        for teacher in ("whole", "sharded", "offloaded", "cached")
    }
    assert where == {"whole": 800, "sharded": 100, "offloaded": 0, "cached": 0}
    hosts = {teacher: states.per_host(WAYS["3"], 8, 8, teacher, born=False) for teacher in where}
    assert hosts == {"whole": 6400, "sharded": 6400, "offloaded": 6400, "cached": 0}
    assert states.per_host(WAYS["3"], 8, 8, "offloaded", born=True) == 800


def test_offloaded_states_are_in_the_memory_of_the_host() -> None:
    """As DeepSpeed's own estimate: 16 bytes a parameter and 18, of all that a host has."""
    model = parameters(1000)
    states = ModelStates.of(model, model)
    assert states.per_process(2, 4, offloaded=True) == 2000
    assert states.per_process(3, 4, offloaded=True) == 0
    assert states.per_host(WAYS["2_offload"], 8, 4, born=True) == 16_000 / 2
    assert states.per_host(WAYS["3_offload"], 8, 4, born=True) == 18_000 / 2
    assert states.per_host(WAYS["2"], 8, 4, born=False) == 4 * 2000  # each process loads it all
    assert states.per_host(WAYS["3"], 8, 4, born=True) == 2000
    assert states.per_host(WAYS["0"], 8, 4, born=False) == 0  # read to the card
    assert states.checkpoint == 14_000


def test_a_layer_is_whole_while_it_computes() -> None:
    layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(4))
    model = nn.ModuleDict({"embed": nn.Linear(5, 5, bias=False), "layers": layers})
    assert largest_layer(model) == 400
    states = ModelStates.of(model.parameters(), layer=largest_layer(model))
    assert states.per_process(3, 100) == 1700 / 100 + 400
    assert states.per_process(3, 1) == 1700  # it is there already
