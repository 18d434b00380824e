"""A recipe is a list of steps: what a method does to a model, as strict YAML.

name: lte-smollm2
paper: arXiv 2402.06126
steps:
  - split: {expert_size: 8}
  - attach: {router: sigmoid}
  - train: {mode: soft, tokens: 500_000, target_sparsity: 0.5}
  - train: {mode: hard, tokens: 500_000}

Names are imported when they are first used: the list of recipes needs no torch, a recipe does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_tools.recipe.files import known_recipes, recipe_path
    from moe_tools.recipe.options import control_recipe, with_options
    from moe_tools.recipe.paths import lasting, lasting_yaml
    from moe_tools.recipe.reading import parse_recipe, read_recipe
    from moe_tools.recipe.recipe import STEPS, Recipe
    from moe_tools.steps.attach import Attach
    from moe_tools.steps.budget import Budget
    from moe_tools.steps.fit import Fit
    from moe_tools.steps.quantize import Quantize
    from moe_tools.steps.refit import Refit
    from moe_tools.steps.schedules import Stage, Weight
    from moe_tools.steps.split import Split
    from moe_tools.steps.step import Step
    from moe_tools.steps.swap import Swap
    from moe_tools.steps.threshold import Threshold
    from moe_tools.training.lora import Lora
    from moe_tools.training.train import Train

__all__ = [
    "STEPS",
    "Attach",
    "Budget",
    "Fit",
    "Lora",
    "Quantize",
    "Recipe",
    "Refit",
    "Split",
    "Stage",
    "Step",
    "Swap",
    "Threshold",
    "Train",
    "Weight",
    "control_recipe",
    "known_recipes",
    "lasting",
    "lasting_yaml",
    "parse_recipe",
    "read_recipe",
    "recipe_path",
    "with_options",
]

_HOME = {
    "STEPS": "moe_tools.recipe.recipe",
    "Attach": "moe_tools.steps.attach",
    "Budget": "moe_tools.steps.budget",
    "Fit": "moe_tools.steps.fit",
    "Lora": "moe_tools.training.lora",
    "Quantize": "moe_tools.steps.quantize",
    "Recipe": "moe_tools.recipe.recipe",
    "Refit": "moe_tools.steps.refit",
    "Split": "moe_tools.steps.split",
    "Stage": "moe_tools.steps.schedules",
    "Step": "moe_tools.steps.step",
    "Swap": "moe_tools.steps.swap",
    "Threshold": "moe_tools.steps.threshold",
    "Train": "moe_tools.training.train",
    "Weight": "moe_tools.steps.schedules",
    "control_recipe": "moe_tools.recipe.options",
    "known_recipes": "moe_tools.recipe.files",
    "lasting": "moe_tools.recipe.paths",
    "lasting_yaml": "moe_tools.recipe.paths",
    "parse_recipe": "moe_tools.recipe.reading",
    "read_recipe": "moe_tools.recipe.reading",
    "recipe_path": "moe_tools.recipe.files",
    "with_options": "moe_tools.recipe.options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_tools.recipe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
