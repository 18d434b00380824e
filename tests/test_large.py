"""What conversion needs of memory: a layer, not the model. In small, what LOG.md has in large."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_tools.recipe import Attach, Recipe, Split
from tests.large import make, watch
from tests.runs.test_stream import tensors

LAYERS, WIDTH, NEURONS = 24, 1024, 2816
LAYER_MIB = (4 * WIDTH**2 + 3 * WIDTH * NEURONS) * 2 // 2**20
"""24 of 600 MiB."""
RECIPE = Recipe(
    "in-small",
    (
        Split(NEURONS // 4, method="kmeans", by="weights"),
        Attach("mean_gate", selector={"kind": "topk", "k": 1}),
    ),
    block_length=16,
)


@pytest.mark.slow
def test_a_streamed_run_needs_memory_for_a_layer(tmp_path: Path) -> None:
    donor = make(tmp_path / "donor", layers=LAYERS, width=WIDTH, neurons=NEURONS, vocab=64)
    words = " ".join(f"w{index % 60}" for index in range(2000))
    (tmp_path / "text.txt").write_text(words)
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    given = [
        "--recipe",
        tmp_path / "recipe.yaml",
        "--model",
        donor,
        "--data",
        tmp_path / "text.txt",
    ]
    own = {}
    for how in ("--stream", "--no-stream"):
        command = [sys.executable, "-m", "moe_tools.cli.main", "convert", how, *map(str, given)]
        code, peak = watch([*command, "--output", str(tmp_path / how), "--eval-tokens", "0"])
        assert code == 0
        own[how] = peak.own
    assert own["--no-stream"] - own["--stream"] > (LAYERS // 2) * LAYER_MIB
    one, other = tensors(tmp_path / "--stream"), tensors(tmp_path / "--no-stream")
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
