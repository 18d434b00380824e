"""Memory that is not there is a MemoryError, whoever asked for it, and the next call is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
