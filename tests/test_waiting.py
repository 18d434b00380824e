"""How OpenMP's threads wait: chosen before torch is loaded, and never against the user's choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_tools.checkpoint.saving import save
from moe_tools.waiting import CHOICES, passive_waiting, wait_policy
from tests.families import build

ROOT = Path(__file__).parents[1]
SAID = {"OMP_DISPLAY_ENV": "VERBOSE"}
SLEEPS = "GOMP_SPINCOUNT = '10000'"
"""What libgomp then says on standard error when it is loaded."""
HELLO = """
import os, sys
from moe_tools.cli.main import main
main(["--version"])
assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"))
"""


def run_python(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, without any choice about waiting but those in `env`."""
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_command_line_chooses_passive_waiting() -> None:
    assert run_python("-c", HELLO).stdout.splitlines()[-1] == "PASSIVE"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_the_user_stays(name: str) -> None:
    policy = run_python("-c", HELLO, **{name: "7"}).stdout.splitlines()[-1]
    assert policy == ("7" if name == "OMP_WAIT_POLICY" else "None")


def test_openmp_reads_the_choice() -> None:
    """It says so when torch loads it: libgomp spins 300,000 times by itself."""
    code = f"{HELLO}\nimport torch"
    assert SLEEPS in run_python("-c", code, **SAID).stderr
    assert SLEEPS not in run_python("-c", code, **SAID, GOMP_SPINCOUNT="7").stderr


def test_a_module_under_patched_waits_passively(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text("import torch")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = run_python("-m", "moe_tools.patched", "probe", **SAID, PYTHONPATH=path)
    assert SLEEPS in done.stderr


def test_it_is_too_late_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    passive_waiting()
    assert not set(CHOICES) & set(os.environ)
    assert wait_policy() == "OpenMP's own"


def test_the_policy_names_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert wait_policy() == "OMP_WAIT_POLICY=ACTIVE"
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    assert wait_policy() == "OMP_WAIT_POLICY=ACTIVE, GOMP_SPINCOUNT=100"


@pytest.mark.slow
def test_doctor_says_what_openmp_does(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "model")
    doctor = ("-m", "moe_tools.cli.main", "doctor", tmp_path / "model")
    done = run_python(*doctor, "--json", "-", **SAID)
    assert json.loads(done.stdout)["machine"]["waiting"] == (
        "OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=10000"
    )
    assert SLEEPS in done.stderr
