"""A run on a text too long for memory, which may kill itself: `python tests/runs/long_text.py ...`.

FOLDER KIND KILL    KIND is file, epochs, stream or billion; KILL is no, cache or step:N
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

from moe_tools import processes
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
    "billion": (Train(tokens=10**9, **TRAIN | {"checkpoint_every": 100}),),
}


def endless() -> Iterator[dict[str, str]]:
    """A stream without end, of 30 or, where memory is watched, 1,000 words a row."""
    draw, words = random.Random(0), 1000 if sys.argv[2] == "billion" else 30
    for _ in itertools.count():
        yield {"text": " ".join(f"w{draw.randrange(60)}" for _ in range(words))}


def load_dataset(*_: Any, streaming: bool) -> dict[str, Any]:
    """Stands in for the hub."""
    assert streaming
    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(endless, features=features)
    return {"train": stream, "test": stream}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, now, or VmHWM, at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def say_memory(before: int, trainer: RecipeTrainer) -> None:
    """Keeps what the run took beside the weights, their gradients and Adam, and ends it."""
    model = sum(4 * one.numel() * one.element_size() for one in trainer.model.parameters())
    found = {"over": memory("VmHWM") - before - model, "model": model}
    (Path(os.environ["OUTPUT"]) / f"{processes.rank()}.json").write_text(json.dumps(found))
    processes.barrier()
    os._exit(0)


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
            if kind == "billion":
                say_memory(before, self)
            kill()

    before = memory("VmRSS")
    data = str(folder / "text.jsonl") if kind in ("file", "epochs") else "hub:endless"
    recipe = Recipe("long", STEPS[kind], data=data, block_length=LENGTH)
    large = kind == "billion"
    with (
        patch.object(shards, "SHARD", shards.SHARD if large else 700),
        patch.object(packing, "IN_MEMORY", packing.IN_MEMORY if large else 0),
        processes.process_group("cpu"),
        patch.object(datasets, "load_dataset", load_dataset),
        patch.object(shards.Stored, "_write", write_half if when == "cache" else write),
        patch.object(RecipeTrainer, "end_step", die if when.startswith("step") else end_step),
    ):
        output = Path(os.environ["OUTPUT"])
        run(recipe, str(folder / "donor"), output, dtype=torch.float32)
    print(json.dumps(json.loads((output / "metrics.json").read_text())["text"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
