"""Two streams at the same time: neither writes into what the other reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.ways import Way, every_way, make

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
ROUNDS = 40


@every_way
@pytest.mark.parametrize("shared", [False, True], ids=["two FFNs", "one FFN"])
def test_calls_on_two_streams_equal_calls_on_one(name: str, shared: bool) -> None:
    one = make(name, torch.bfloat16, "cuda")
    ways = [one, one if shared else make(name, torch.bfloat16, "cuda")]
    turns = [(place, ways[place].draw()) for _ in range(ROUNDS) for place in (0, 1)]
    with torch.no_grad():
        expected = [ways[place].run(*inputs) for place, inputs in turns]
        found = on_streams(ways, turns)
    for y_TD, expected_TD in zip(found, expected, strict=True):
        assert torch.equal(y_TD, expected_TD)


def on_streams(ways: list[Way], turns: list[tuple[int, tuple[Tensor, ...]]]) -> list[Tensor]:
    """What each turn computes on the stream of its place; the streams wait for nothing."""
    streams = [torch.cuda.Stream() for _ in ways]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for place, inputs in turns:
        with torch.cuda.stream(streams[place]):
            found.append(ways[place].run(*inputs))
    torch.cuda.synchronize()
    return found
