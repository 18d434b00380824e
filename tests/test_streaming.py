"""Steps layer by layer: the same files as in memory, whatever the family, the step or the shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import set_seed

from moe_tools.data.generate import evaluating
from moe_tools.model.checkpoint import load, load_tokenizer, save
from moe_tools.recipe import Attach, Fit, Split, Swap
from moe_tools.run_step import Calibrating, apply_step, needs_text
from moe_tools.streaming import Streamed
from tests.families import FAMILIES, build, logits

BLOCKS_BT = torch.randint(3, 64, (9, 16), generator=torch.Generator().manual_seed(2))
"""Two whole batches of four blocks, and one block."""
SEED = 3
WEIGHTS = Split(8, method="kmeans", by="weights")
ACTIVATIONS = Split(8, shared_experts=1)


@pytest.fixture(scope="session")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every family, in shards, with the names that the hub has."""
    folder = tmp_path_factory.mktemp("donors")
    for name in FAMILIES:
        torch.manual_seed(0)
        build(name).save_pretrained(folder / name, max_shard_size="20KB")
    return folder


@dataclass(frozen=True)
class Chain:
    """The same steps on the same donor, in memory and layer by layer."""

    donor: Path
    out: Path
    dtype: torch.dtype = torch.float32

    def whole(self, *steps: Calibrating) -> tuple[Path, list[dict[str, Any]]]:
        folder, measured = self.donor, []
        for index, step in enumerate(steps):
            set_seed(SEED)
            model = load(folder, dtype=self.dtype)
            work = self.out / f"whole-{index}.work"
            found = apply_step(model, step, BLOCKS_BT, work, donor=str(self.donor), seed=SEED)
            folder = self.out / f"whole-{index}"
            save(model, folder)
            measured.append(found)
        return folder, measured

    def streamed(self, *steps: Calibrating) -> tuple[Path, list[dict[str, Any]]]:
        folder, measured = self.donor, []
        for index, step in enumerate(steps):
            set_seed(SEED)
            one = self.one(step, folder, index)
            measured.append(one.run())
            folder = self.out / f"streamed-{index}"
            one.save(folder, None)
        return folder, measured

    def one(self, step: Calibrating, source: Path, index: int) -> Streamed:
        return Streamed(
            str(source),
            self.out / f"streamed-{index}.work",
            step,
            BLOCKS_BT if needs_text(step) else None,
            donor=str(self.donor),
            seed=SEED,
            dtype=self.dtype,
            device="cpu",
        )


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def assert_same(chain: Chain, *steps: Calibrating) -> Path:
    """The same tensors and figures, and the same files but for the shards."""
    (whole, measured), (streamed, also) = chain.whole(*steps), chain.streamed(*steps)
    a, b = tensors(whole), tensors(streamed)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
    for path in whole.glob("*.json"):
        assert path.read_bytes() == (streamed / path.name).read_bytes(), path.name
    assert measured == also
    return streamed


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_alone(name: str, donors: Path, tmp_path: Path) -> None:
    steps = (Swap({"kind": "relu"}), WEIGHTS, Attach("sigmoid", start="open"))
    out = assert_same(Chain(donors / name, tmp_path), *steps)
    assert torch.isfinite(logits(load(out))).all()


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith("t5")])
def test_with_activations(name: str, donors: Path, tmp_path: Path) -> None:
    assert_same(Chain(donors / name, tmp_path), ACTIVATIONS, Attach())
