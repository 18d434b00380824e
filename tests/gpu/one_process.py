"""One process that trains under ZeRO: `one_process.py OUT DEVICE DTYPE`.

DeepSpeed changes what it is imported into, so it gets a process of its own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_tools import processes
from moe_tools.recipe import Recipe
from moe_tools.recipe.deepspeed import deepspeed_path, read_deepspeed
from moe_tools.steps.launch import Launch
from moe_tools.training.train import train
from tests.training.test_train import HARD, converted, text
from tests.training.two_processes import keep, quick_deepspeed

DTYPES: dict[Any, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = ("zero2", "zero3")
STEP = replace(HARD, target_sparsity=0.4)


def two_steps(folder: Path, dtype: str, launch: Launch) -> None:
    """Trains, and keeps figures and weights in `folder`."""
    model = converted(DTYPES[dtype])
    figures = train(model, STEP, text(2 * STEP.batch_size), folder / "work", launch=launch)
    assert figures["steps"] == 2
    keep(folder, figures, model.cpu())


def main(out: Path, device: str, dtype: Any) -> None:
    """Trains under each of `STAGES`."""
    if device == "cpu":
        quick_deepspeed()
    with processes.process_group(device, alone=True):
        for name in STAGES:
            recipe = Recipe("test", (STEP,))
            config = read_deepspeed(deepspeed_path(name), recipe, dtype=dtype, processes=1)
            two_steps(out / name, dtype, Launch(device, deepspeed=config))


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    main(Path(folder), *words)
