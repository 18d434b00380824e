"""A run on a text too long for memory, which may kill itself: `python tests/runs/long_text.py ...`.

FOLDER KIND KILL    KIND is file, epochs or stream; KILL is no, cache or step:N
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch

from moe_tools.data import packing, shards
from moe_tools.recipe import Recipe, Train
from moe_tools.runs.run import run
from moe_tools.training.trainer import RecipeTrainer

LENGTH = 16
TOKENS = 24 * 4 * LENGTH
TRAIN: dict[str, Any] = {"batch_size": 4, "lr": 1e-3, "checkpoint_every": 2}
STEPS = {
    "file": (Train(tokens=TOKENS // 2, **TRAIN), Train(tokens=TOKENS // 2, **TRAIN)),
    "stream": (Train(tokens=TOKENS, **TRAIN),),
    "epochs": (Train(epochs=1.5, **TRAIN), Train(epochs=1, **TRAIN)),
}


def endless() -> Iterator[dict[str, str]]:
    """A stream without end."""
    draw = random.Random(0)
    for _ in itertools.count():
        yield {"text": " ".join(f"w{draw.randrange(60)}" for _ in range(30))}


def load_dataset(*_: Any, streaming: bool) -> dict[str, Any]:
    """Stands in for the hub."""
    assert streaming
    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(endless, features=features)
    return {"train": stream, "test": stream}


def kill() -> None:
    """No handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kind: str, when: str) -> None:
    """Runs, or dies on the way."""
    write, end_step = shards.Stored._write, RecipeTrainer.end_step
    seen = [0]

    def write_half(self: shards.Stored, rows: Any, after: Any) -> None:
        if len(self.shards) == 1:
            (self.folder / "00001.ids").write_bytes(b"half")
            kill()
        write(self, rows, after)

    def die(self: RecipeTrainer) -> None:
        end_step(self)
        seen[0] += 1
        if seen[0] == int(when.partition(":")[2]):
            kill()

    data = "hub:endless" if kind == "stream" else str(folder / "text.jsonl")
    recipe = Recipe("long", STEPS[kind], data=data, block_length=LENGTH)
    with (
        patch.object(shards, "SHARD", 700),
        patch.object(packing, "IN_MEMORY", 0),
        patch.object(datasets, "load_dataset", load_dataset),
        patch.object(shards.Stored, "_write", write_half if when == "cache" else write),
        patch.object(RecipeTrainer, "end_step", die if when.startswith("step") else end_step),
    ):
        output = Path(os.environ["OUTPUT"])
        run(recipe, str(folder / "donor"), output, dtype=torch.float32)
    print(json.dumps(json.loads((output / "metrics.json").read_text())["text"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
