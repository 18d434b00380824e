"""Small matrices share huge pages; and memory that is not there is a MemoryError, whoever asked.

After such an error the next call is right.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_tools.kernels.cpu import memory
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.memory import HUGE_PAGE, LINE, SLAB, aligned, allocate
from tests.kernels.compiler import ROOT, compile_library

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
@pytest.mark.parametrize("call", ["prepare", "few", "many"])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_allocation_that_fails_is_a_memory_error_and_leaves_the_state_usable(
    call: str, threads: int, library: Path
) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "fail_allocations.py", library, call, str(threads)],
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    failed = int(done.stdout)
    assert failed > {"prepare": 0, "few": 3, "many": 20}[call]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`operator new` that fails on demand."""
    folder = tmp_path_factory.mktemp("failing_new")
    source = folder / "failing_new.cpp"
    header = ROOT / "kernels" / "csrc" / "failing_new.h"
    exported = "auto exported = std::make_pair(&fail_calls, &stop_failing);"
    source.write_text(f'#include "{header}"\n#include <utility>\n{exported}\n')
    return compile_library(source, folder)


# --- slabs ----------------------------------------------------------------------------------------

SIZES = [1, 63, 64, 65, 1000, 4096, 70_001]


def span(made: Tensor) -> tuple[int, int]:
    return made.data_ptr(), made.data_ptr() + made.numel()


def overlap(made: list[Tensor]) -> bool:
    spans = sorted(span(one) for one in made)
    return any(one[1] > other[0] for one, other in itertools.pairwise(spans))


@pytest.fixture
def slab(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A slab of our own: what other tests hold is no matter."""
    made = memory._Slab()
    monkeypatch.setattr(memory, "_slab", made)
    return made


@pytest.mark.usefixtures("slab")
def test_small_matrices_share_pages_and_no_line() -> None:
    made = [allocate((size,)) for size in SIZES * 5]
    assert all(one.data_ptr() % LINE == 0 for one in made)
    assert not overlap(made)
    first, last = min(map(span, made))[0], max(map(span, made))[1]
    assert last - first <= sum(SIZES) * 5 + LINE * len(made) and first % HUGE_PAGE == 0
    for number, one in enumerate(made):
        one.fill_(number)
    assert all(one.eq(number).all() for number, one in enumerate(made))


@pytest.mark.usefixtures("slab")
def test_what_is_large_has_pages_of_its_own() -> None:
    small, large = allocate((3, 64)), allocate((2, HUGE_PAGE))
    assert large.shape == (2, HUGE_PAGE) and large.data_ptr() % HUGE_PAGE == 0
    assert not overlap([small, large, allocate((3, 64))])


@pytest.mark.usefixtures("slab")
def test_a_full_slab_is_followed_by_another() -> None:
    size = HUGE_PAGE - LINE
    made = [allocate((size,)) for _ in range(SLAB // size + 2)]
    assert not overlap(made) and all(one.data_ptr() % LINE == 0 for one in made)


@pytest.mark.usefixtures("slab")
@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0)])
def test_nothing_takes_nothing(shape: tuple[int, ...]) -> None:
    before, made, behind = allocate((64,)), allocate(shape), allocate((64,))
    assert made.shape == shape and behind.data_ptr() == before.data_ptr() + 64


@pytest.mark.usefixtures("slab")
def test_a_pickle_holds_the_bytes_of_one_alone() -> None:
    others = [allocate((1000,)) for _ in range(3)]
    others[1].copy_(torch.arange(1000) % 251)
    written = pickle.dumps(others[1])
    assert len(written) < 1000 + 500
    again = aligned(pickle.loads(written))
    assert torch.equal(again, others[1]) and again.data_ptr() % LINE == 0
    linear = CpuLinear(torch.randn(16, 16), None, torch.float32)
    assert len(pickle.dumps(linear)) < 16 * 16 * 4 + 2000


@pytest.mark.usefixtures("slab")
def test_what_lies_on_lines_is_not_copied() -> None:
    made = allocate((1000,))
    assert aligned(made) is made
    moved = aligned(made[1:])
    assert moved.data_ptr() % LINE == 0 and not overlap([made, moved])


def test_pages_are_free_when_all_that_lie_on_them_are(
    slab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(np.ndarray):
        """An array that can be referred to weakly."""

    pages: list[weakref.ref[Any]] = []
    on_pages = memory._on_pages

    def watched(size: int) -> Any:
        made = on_pages(size).view(Watched)
        pages.append(weakref.ref(made))
        return made

    monkeypatch.setattr(memory, "_on_pages", watched)
    size = HUGE_PAGE // 2
    first, second = allocate((size,)), allocate((size,))
    while len(pages) < 2:  # the slab goes on to other pages
        allocate((size,))
    del first
    gc.collect()
    assert pages[0]() is not None
    assert second.fill_(1).sum() == size
    del second
    gc.collect()
    assert pages[0]() is None


@pytest.mark.usefixtures("slab")
def test_threads_share_no_line() -> None:
    made: list[Tensor] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        made.extend([allocate((size,)) for size in SIZES * 40])

    team = [threading.Thread(target=work) for _ in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert len(made) == 4 * 40 * len(SIZES) and not overlap(made)
    assert all(one.data_ptr() % LINE == 0 for one in made)
