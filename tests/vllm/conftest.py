"""All folders and what vLLM does with them, once for all tests: each engine costs seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def in_vllm(jobs: dict[str, Any], place: Path, **variables: str) -> dict[str, Any]:
    """What vLLM says to some jobs, see `tests.vllm.engine`."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    words = ["-m", "tests.vllm.engine", str(place / "jobs.json"), str(place / "results.json")]
    said = os.environ | {"VLLM_CACHE_ROOT": str(place / "cache")} | variables
    said.pop("TRITON_INTERPRET", None)  # of our kernel tests
    subprocess.run([sys.executable, *words], cwd=ROOT, env=said, check=True)
    return json.loads((place / "results.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def plugin() -> None:
    """Checks that vLLM would find the plugin: moe-tools is installed, not only importable."""
    from importlib.metadata import entry_points

    assert "moe_tools" in {one.name for one in entry_points(group="vllm.general_plugins")}
