"""What `-m gpu` runs, with a card and without one: pytest in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EITHER = "tests/kernels/triton/test_launches.py"
"""Tests that need no numbers, so that they pass on a card that is not there."""
INTERPRETED = "tests/kernels/triton/test_reads.py"
CARD = "tests/gpu/test_graphs.py"

A_CARD = """
import os, torch
torch.cuda.is_available = lambda: True
def pytest_report_header():
    return f"TRITON_INTERPRET is {os.environ.get('TRITON_INTERPRET')}"
"""
"""A plugin that says there is one."""


def asked(*words: str, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    """pytest of these words, on a machine that shows no card."""
    path = os.pathsep.join([str(ROOT), *([str(plugins)] if plugins else [])])
    dropped = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def a_card(tmp_path: Path) -> Path:
    (tmp_path / "a_card.py").write_text(A_CARD)
    return tmp_path


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_without_a_card_it_is_refused_in_one_line(workers: tuple[str, ...]) -> None:
    done = asked("-m", "gpu and not slow", EITHER, *workers)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: -m gpu asks for a card, and torch sees none"
    assert done.stdout == ""


@pytest.mark.parametrize("words", [(), ("-m", "not slow"), ("-m", "not gpu")], ids=" ".join)
def test_who_does_not_ask_has_the_others(words: tuple[str, ...]) -> None:
    done = asked(*words, "--collect-only", "-q", EITHER, INTERPRETED, CARD)
    assert done.returncode == 0, done.stdout
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {EITHER, INTERPRETED}
    assert "deselected" in done.stdout and "skipped" not in done.stdout


def test_on_a_card_kernels_are_compiled_and_what_looks_into_the_interpreter_is_left_out(
    a_card: Path,
) -> None:
    words = ("-p", "a_card", "-m", "gpu", "--collect-only", EITHER, INTERPRETED, CARD)
    done = asked(*words, plugins=a_card)
    assert done.returncode == 0, done.stdout
    assert "TRITON_INTERPRET is None" in done.stdout
    assert all(f"<Module {Path(file).name}>" in done.stdout for file in (EITHER, CARD))
    assert f"<Module {Path(INTERPRETED).name}>" not in done.stdout


@pytest.mark.slow
def test_so_it_is_in_a_worker(a_card: Path) -> None:
    done = asked("-p", "a_card", "-m", "gpu", "-n", "1", EITHER, INTERPRETED, plugins=a_card)
    assert done.returncode == 0, done.stdout
    assert "TRITON_INTERPRET is None" in done.stdout and " passed" in done.stdout
