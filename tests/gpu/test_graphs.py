"""CUDA graphs: captured once, replayed with other inputs and other experts, equal to eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.gpu.ways import every_dtype, every_way, every_way_that_learns, make

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
REPLAYS = 8


def captured(
    compute: Callable[..., Sequence[Tensor]], *inputs: Tensor
) -> Callable[..., list[Tensor]]:
    """A graph of one call; what is returned computes the same of other inputs by a replay."""
    held = [one.clone() for one in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated once, is before the capture
        compute(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute(*held)

    def replay(*given: Tensor) -> list[Tensor]:
        for mine, one in zip(held, given, strict=True):
            mine.copy_(one)
        graph.replay()
        return [one.clone() for one in results]

    return replay


@every_way
@every_dtype
def test_a_replay_with_other_experts_equals_eager(name: str, dtype: torch.dtype) -> None:
    """The launches do not depend on what a router chose."""
    way = make(name, dtype, "cuda")
    with torch.no_grad():
        replay = captured(lambda *inputs: [way.run(*inputs)], *way.draw())
        for _ in range(REPLAYS):
            inputs = way.draw()
            (y_TD,) = replay(*inputs)
            assert torch.equal(y_TD, way.run(*inputs))


@pytest.mark.parametrize("share", [0, 1])
def test_so_does_one_with_no_expert_or_all(share: float) -> None:
    way = make("experts", torch.float32, "cuda")
    with torch.no_grad():
        replay = captured(lambda *inputs: [way.run(*inputs)], *way.draw())
        x_TD, mask_TE = way.draw()
        mask_TE = torch.full_like(mask_TE, bool(share))
        (y_TD,) = replay(x_TD, mask_TE)
        assert torch.equal(y_TD, way.run(x_TD, mask_TE))
        assert bool(y_TD.any()) == bool(share)


@every_way_that_learns
@every_dtype
def test_a_graph_may_hold_the_backward_pass(name: str, dtype: torch.dtype) -> None:
    way = make(name, dtype, "cuda")
    replay = captured(way.gradients, *way.draw())
    for _ in range(REPLAYS):
        inputs = way.draw()
        assert all(map(torch.equal, replay(*inputs), way.gradients(*inputs)))
