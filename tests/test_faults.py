"""A few of the faults of `make faults`: kills, a full disk, hostile and damaged files.

They run in a program of their own, whose children are forks of it: pytest's process has threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and asks /proc"),
]


def faults(part: str, *words: str) -> str:
    """What `python -m tests.faults` says of one part; it fails where it finds a fault."""
    command = [sys.executable, "-m", "tests.faults", "--only", part, "--workers", "2", *words]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_killed_run_is_resumed_to_the_same_bits() -> None:
    assert "0 did not" in faults("kills", "--kills", "6")


def test_a_run_on_a_full_disk_goes_on_once_there_is_room() -> None:
    said = faults("disk", "--disks", "4")
    if "left out" in said:
        pytest.skip("only root may mount a small disk")
    assert "0 faults" in said


def test_hostile_and_damaged_files_are_refused_in_one_line() -> None:
    assert "0 faults" in faults("files", "--files", "40", "--few")
