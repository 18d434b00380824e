"""The table of `python -m tools.resources`: within the budget, on no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tools.resources import BUDGET, TARGETS, Usage

ROOT = Path(__file__).parents[2]
WITH_ROWS = {
    *("list_firing", "list_routed", "list_proposed"),
    *("compute_hidden", "compute_hidden_grads", "combine"),
    *("compute_pairs_hidden", "compute_pairs_hidden_grads", "combine_pairs"),
}
FLOATS, SCORED, CODES, GROUPED = (2, 1), (2, 0), (4, 0), 3 + 4
"""Forward and backward passes of the cases: experts and gate first, and backward; of a router and a
proposal; of int8 and int4. Launches of groups of many tokens, both ways."""
AMD = [name for name in TARGETS if name.startswith("gfx")]


def launches(passes: list[tuple[int, int]], target: str) -> int:
    """On AMD shares are added in a launch of their own."""
    forward, backward = (sum(numbers) for numbers in zip(*passes, strict=True))
    own = forward + backward if target in AMD else 0
    return 3 * forward + 5 * backward + own


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: here the kernels are interpreted, not compiled.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.resources", *arguments]
    environment = kept | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def table(*arguments: str) -> list[Usage]:
    done = run("--json", *arguments)
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    found = [Usage(**row | {"load_bits": tuple(row["load_bits"])}) for row in rows]
    over = [usage for usage in found if not usage.fits]
    assert (done.returncode, over) == (0, []), done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        *((("4096", "11008"), tokens) for tokens in ("1", "16", "64", "512")),
        (("576", "1536"), "1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(value),
)
def test_every_kernel_is_within_the_budget(shape: tuple[str, str], tokens: str) -> None:
    found = table("--shape", *shape, "--tokens", tokens)
    assert {usage.target for usage in found} == set(TARGETS)
    for target in TARGETS:
        half = GROUPED if tokens == "512" else launches([FLOATS, SCORED, CODES], target)
        wide = launches([FLOATS], target) if tokens == "1" else 0
        dtypes = 2 if target == "sm_90" else 1  # bf16, and there fp16; fp32 for one token
        assert sum(usage.target == target for usage in found) == dtypes * half + wide
    for usage in found:
        assert bool(usage.load_bits) == (usage.kernel in WITH_ROWS), usage


@pytest.mark.parametrize(
    "changes", [{"registers": 225}, {"spills": 8}, {"shared": 53249}, {"load_bits": (64, 128)}]
)
def test_what_is_over_the_budget_does_not_fit(changes: dict[str, Any]) -> None:
    lean = Usage("experts", "combine", "sm_90", 96, 0, 1024, (128,))
    assert lean.fits
    assert not replace(lean, **changes).fits


def test_the_budget_is_the_one_in_the_docs() -> None:
    page = ROOT / "docs" / "kernels.md"
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", page.read_text("utf-8"), re.M)
    assert {name: (int(most), int(kib)) for name, most, kib in rows} == BUDGET


def test_interpreted_kernels_are_refused() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr
