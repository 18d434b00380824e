"""Programs that run at the same time: the reference's numbers, and the same bits every time."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.ways import error, every_dtype, every_way, every_way_that_learns, make, tolerance

pytest.importorskip("triton")

RUNS = {"cpu": 2, "cuda": 30}
"""Interpreted, programs run one after the other: more runs show no more."""


@every_way
@every_dtype
def test_y_is_that_of_the_reference(name: str, dtype: torch.dtype, place: str) -> None:
    way = make(name, dtype, place)
    for _ in range(RUNS[place] // 2):
        inputs = way.draw()
        with torch.no_grad():
            y_TD = way.run(*inputs)
        assert y_TD.dtype == dtype and y_TD.device.type == place
        assert error(y_TD, way.exact(*inputs)) <= tolerance(name, dtype)


@every_way
@every_dtype
def test_every_run_gives_the_same_bits(name: str, dtype: torch.dtype, place: str) -> None:
    way = make(name, dtype, place)
    inputs = way.draw()
    with torch.no_grad():
        first_TD = way.run(*inputs)
        assert all(torch.equal(way.run(*inputs), first_TD) for _ in range(RUNS[place]))


@every_way_that_learns
@every_dtype
def test_so_does_every_backward_pass(name: str, dtype: torch.dtype, place: str) -> None:
    way = make(name, dtype, place)
    inputs = way.draw()
    first = way.gradients(*inputs)
    for _ in range(RUNS[place]):
        assert all(map(torch.equal, way.gradients(*inputs), first))
