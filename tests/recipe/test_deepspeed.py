"""DeepSpeed's JSON beside a recipe: what is filled in, what contradicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_tools.recipe import Recipe, Split, Train
from moe_tools.recipe.deepspeed import deepspeed_path, read_deepspeed

RECIPE = Recipe("test", (Split(), Train(tokens=1, batch_size=4, accumulate=2)))
SHIPPED = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
ZERO0 = ("zero0", "bf16")
"""Its masters cannot be reached, and routers are shifted in their masters."""


def read(config: Any, tmp_path: Path, dtype: Any = "bf16") -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return read_deepspeed(file, RECIPE, dtype=dtype, processes=2)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in SHIPPED for d in ("bf16", "fp32") if (n, d) != ZERO0]
)
def test_shipped_configurations_fit_every_recipe(name: str, dtype: Any) -> None:
    config = read_deepspeed(deepspeed_path(name), RECIPE, dtype=dtype, processes=2)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["train_batch_size"] == "auto"


def test_numbers_that_agree_with_the_recipe_are_taken(tmp_path: Path) -> None:
    sizes = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 16,
        "gradient_clipping": 1.0,
    }
    zero = {"zero_optimization": {"stage": 1}}
    config = read({**sizes, **zero, "bf16": {"enabled": True}, "steps_per_print": 7}, tmp_path)
    assert {config[key] for key in sizes} == {"auto"}  # each train step has its own
    assert config["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "ds.json is no JSON file: Expecting property name"),
        ([], "ds.json: expected keys and values, not list"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu is 8, but batch_size of the recipe is 4: write `auto`",
        ),
        ({"gradient_accumulation_steps": 1}, "is 1, but accumulate of the recipe is 2"),
        ({"train_batch_size": 8}, r"is 8, but batch_size \* accumulate \* processes .* is 16"),
        ({"gradient_clipping": 0.5}, "is 0.5, but gradient clipping of the recipe is 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but the run is in bf16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but the run is in bf16"),
        ({"fp16": True}, "fp16 is True, but must be keys and values"),
        ({"torch_autocast": {"enabled": True}}, "delete `torch_autocast`"),
        ({"optimizer": {"type": "Adam"}}, "the recipe sets the optimizer: delete `optimizer`"),
        ({"scheduler": {}}, "the recipe sets the scheduler: delete `scheduler`"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4, but must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO-0 keeps the fp32 masters of bf16 weights out"),
        ({"zero_optimization": 2}, "zero_optimization is 2, but must be keys and values"),
    ],
)
def test_contradictions_are_one_line(config: Any, message: str, tmp_path: Path) -> None:
    if isinstance(config, dict):
        config = {"zero_optimization": {"stage": 1}} | config
    with pytest.raises(ValueError, match=message) as said:
        read(config, tmp_path)
    assert "\n" not in str(said.value)


def test_bf16_does_not_fit_an_fp32_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bf16\.enabled is True, but the run is in fp32"):
        read({"bf16": {"enabled": True}}, tmp_path, dtype="fp32")


def test_an_unknown_name_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="unknown DeepSpeed configuration 'zero4'"):
        deepspeed_path("zero4")
