"""What only some machines have: tests of it are left out unless `-m` asks for their mark."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def asks_for(config: pytest.Config, mark: str) -> bool:
    """Whether `-m` names a mark, other than in `not mark`; xdist hands `-m` down to its workers."""
    expression = config.known_args_namespace.markexpr or ""
    return re.search(rf"(?<!not )\b{mark}\b", expression) is not None


def powerinfer() -> Path:
    """The folder of PowerInfer's programs."""
    return (Path(os.environ.get("POWERINFER") or "POWERINFER") / "bin").resolve()


def _without_powerinfer() -> str | None:
    lacking = [one for one in ("main", "perplexity") if not (powerinfer() / one).is_file()]
    if not lacking:
        return None
    return (
        f"PowerInfer, and {powerinfer()} has no {lacking[0]}: name its build directory by the "
        "variable POWERINFER"
    )


MARKS: dict[str, Callable[[], str | None]] = {
    "gpu": lambda: None if torch.cuda.is_available() else "a card, and torch sees none",
    "vllm": lambda: None if find_spec("vllm") else "vLLM, which is not installed: make test-vllm",
    "powerinfer": _without_powerinfer,
}
"""Mark -> what is missing here, where something is."""


def check_marks(config: pytest.Config) -> None:
    """Refuses what is asked for and not there: a run that skipped all of it would look well."""
    for mark, missing in MARKS.items():
        if asks_for(config, mark) and (what := missing()) is not None:
            raise pytest.UsageError(f"-m {mark} asks for {what}")


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what nobody asks for, as by -m, not skipped: who has none need not read of it."""
    marks = [mark for mark in MARKS if not asks_for(config, mark)]
    left = [item for item in items if any(item.get_closest_marker(mark) for mark in marks)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
