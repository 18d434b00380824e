"""A DeepSpeed configuration, held against the recipe whose train steps it is to run. No torch.

The recipe says what is computed (batches, optimizer, learning rates, clipping); the JSON says where
the tensors are. What both could say must be `auto` in the JSON, or the same.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from moe_tools.recipe.recipe import Recipe
from moe_tools.registry import unknown
from moe_tools.training.arguments import CLIPPING
from moe_tools.training.train import Train

STAGES = (0, 1, 2, 3)
FILLED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    # With optimizer offload, PyTorch's AdamW runs on the CPU: DeepSpeed's own is compiled at start.
    "zero_force_ds_cpu_optimizer": False,
}
"""What we fill in: transformers replaces `auto` by the train step's values."""


def deepspeed_path(name: str) -> Path:
    """A file, or one of those that come with moe-tools, e.g. zero3.

    Raises:
        ValueError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = files("moe_tools.recipes").joinpath("deepspeed").iterdir()
    known = {file.stem: file for file in sorted(Path(str(entry)) for entry in found)}
    if name not in known:
        raise unknown("DeepSpeed configuration", name, known)
    return known[name]


def read_deepspeed(
    path: str | Path, recipe: Recipe, *, dtype: Literal["bf16", "fp32"], processes: int
) -> dict[str, Any]:
    """The configuration for every train step of a recipe.

    Args:
        path: a JSON file.
        recipe: what will be trained.
        dtype: of the host's weights.
        processes: how many train together.

    Raises:
        ValueError: no such file, no JSON, or a value that contradicts the recipe.
    """
    path = Path(path)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected keys and values, not {type(config).__name__}")
    _check_dtype(config, path, dtype)
    _check_zero(config, path, dtype)
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(f"{path}: the recipe sets the {key}: delete `{key}`")
    for step in recipe.train_steps:
        _check_sizes(config, path, step, processes)
    return config | FILLED


def _check_zero(config: dict[str, Any], path: Path, dtype: str) -> None:
    stage = _section(config, path, "zero_optimization").get("stage", 0)
    if stage not in STAGES or isinstance(stage, bool):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}, but must be 0, 1, 2 or 3")
    if stage == 0 and dtype == "bf16":  # a shift of the routers would be lost at the next step
        raise ValueError(
            f"{path}: ZeRO-0 keeps the fp32 masters of bf16 weights out of reach: use zero1, "
            "--dtype fp32, or no DeepSpeed"
        )


def _check_dtype(config: dict[str, Any], path: Path, dtype: str) -> None:
    wanted = {"bf16": dtype == "bf16", "fp16": False}
    for key, ours in wanted.items():
        given = _section(config, path, key).get("enabled", "auto" if ours else False)
        if given not in ("auto", ours):
            raise ValueError(
                f"{path}: {key}.enabled is {given}, but the run is in {dtype}: "
                "write `auto`, or choose another --dtype (bf16 or fp32)"
            )
    if _section(config, path, "torch_autocast").get("enabled", False):
        raise ValueError(f"{path}: the weights are trained in {dtype}: delete `torch_autocast`")


def _section(config: dict[str, Any], path: Path, key: str) -> dict[str, Any]:
    section = config.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {key} is {section!r}, but must be keys and values")
    return section


def _check_sizes(config: dict[str, Any], path: Path, step: Train, processes: int) -> None:
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", step.batch_size),
        "gradient_accumulation_steps": ("accumulate", step.accumulate),
        "train_batch_size": (
            "batch_size * accumulate * processes",
            step.batch_size * step.accumulate * processes,
        ),
        "gradient_clipping": ("gradient clipping", CLIPPING),
    }
    for key, (name, value) in ours.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise ValueError(
                f"{path}: {key} is {given}, but {name} of the recipe is {value}: write `auto`"
            )
