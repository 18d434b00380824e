"""A recipe as a run of it begins: on this donor, and the same from any directory."""

from __future__ import annotations

from dataclasses import replace

from moe_tools.checkpoint.block_length import fitting_length
from moe_tools.recipe import Recipe, lasting


def prepare(recipe: Recipe, source: str) -> Recipe:
    """The text by its absolute path, in blocks no longer than the donor's context.

    Train steps of 0 tokens, which wait for `--tokens`, fall away. The block length of a recipe fits
    the donor that it was tuned on; what the user says is checked before
    (`moe_tools.checkpoint.block_length.check_given`). Prepared twice is prepared once.
    """
    length = fitting_length(source, recipe.block_length, task=recipe.task)
    steps = tuple(step for step in recipe.steps if step.amount or not step.trains)
    if not steps:
        raise ValueError(
            f"recipe {recipe.name}: its train steps have neither tokens nor epochs: give --tokens"
        )
    return replace(lasting(recipe), block_length=length, steps=steps)
