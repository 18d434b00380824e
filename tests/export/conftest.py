"""Tests in another program, built outside this repository: left out unless -m asks for them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest


def asks_for_powerinfer(config: pytest.Config) -> bool:
    """Whether `-m` names powerinfer, other than in `not powerinfer`."""
    expression = config.known_args_namespace.markexpr or ""
    return re.search(r"(?<!not )\bpowerinfer\b", expression) is not None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what nobody asks for, without a word; refuses what is asked for and not there."""
    if asks_for_powerinfer(config):
        for program in ("main", "perplexity"):
            if not (build() / "bin" / program).is_file():
                raise pytest.UsageError(
                    f"-m powerinfer asks for PowerInfer, and {build()} has no bin/{program}: name "
                    "its build directory by the variable POWERINFER"
                )
        return
    left_out = [one for one in items if one.get_closest_marker("powerinfer")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [one for one in items if one not in left_out]


def build() -> Path:
    """Where PowerInfer was built."""
    return Path(os.environ.get("POWERINFER") or "POWERINFER")


@pytest.fixture
def programs() -> Path:
    """The folder of PowerInfer's programs."""
    return (build() / "bin").resolve()
