"""A recipe is a list of steps: what a method does to a model, as strict YAML. Imports no torch.

name: lte-smollm2
paper: arXiv 2402.06126
steps:
  - split: {expert_size: 8}
  - attach: {router: sigmoid}
  - train: {mode: soft, tokens: 500_000, target_sparsity: 0.5}
  - train: {mode: hard, tokens: 500_000}
"""

from moe_tools.recipe.options import control_recipe, with_options
from moe_tools.recipe.reading import known_recipes, parse_recipe, read_recipe, recipe_path
from moe_tools.recipe.recipe import Recipe
from moe_tools.recipe.rules import check_step
from moe_tools.recipe.step import (
    STEPS,
    Attach,
    Budget,
    Fit,
    Lora,
    Split,
    Stage,
    Step,
    Swap,
    Train,
    Weight,
    step_name,
)

__all__ = [
    "STEPS",
    "Attach",
    "Budget",
    "Fit",
    "Lora",
    "Recipe",
    "Split",
    "Stage",
    "Step",
    "Swap",
    "Train",
    "Weight",
    "check_step",
    "control_recipe",
    "known_recipes",
    "parse_recipe",
    "read_recipe",
    "recipe_path",
    "step_name",
    "with_options",
]
