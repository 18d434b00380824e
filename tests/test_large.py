"""What conversion needs of memory: a layer, not the model. In small, what LOG.md has in large."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_tools.checkpoint.shards import write_index
from moe_tools.experts.conversion import Conversion
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


@pytest.mark.slow
@pytest.mark.parametrize("target", ["dense", "moe", "gguf"])
def test_an_export_needs_memory_for_a_layer(target: str, tmp_path: Path) -> None:
    """A layer, or a shard of 128 MiB, whichever is more, and as much while it is written."""
    folder = converted_by_hand(tmp_path / "in")
    words = [sys.executable, "-m", "moe_tools.cli.main", "export", str(folder), "--to", target]
    words += ["--output", str(tmp_path / "out"), "--no-check"]
    code, planned = watch([*words, "--dry-run"])
    assert code == 0
    code, peak = watch(words)
    assert code == 0 and (tmp_path / "out").exists()
    assert peak.own - planned.own < LAYERS * LAYER_MIB // 2


def converted_by_hand(folder: Path) -> Path:
    """A random llama with routers, and the block that says so: what a run would write."""
    make(folder, layers=LAYERS, width=WIDTH, neurons=NEURONS, vocab=64)
    routers = {
        f"model.layers.{layer}.mlp.router.{name}": torch.ones(size) * layer
        for layer in range(LAYERS)
        for name, size in (("weight", (11, WIDTH)), ("bias", (11,)))
    }
    shards = sorted(folder.glob("*.safetensors"))
    save_file(routers, folder / f"model-{len(shards) + 1:05}-of-{len(shards):05}.safetensors")
    write_index(folder)
    config = json.loads((folder / "config.json").read_text())
    block = Conversion("donor", 256, "sigmoid", {"kind": "topk", "k": 6})
    config["moe_tools"] = block.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
