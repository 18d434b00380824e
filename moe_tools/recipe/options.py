"""Makes recipes from recipes: under the options of a command line, and the dense control."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from moe_tools.data.rows import Bos, Packing
from moe_tools.data.tasks import Task
from moe_tools.recipe.recipe import Recipe
from moe_tools.steps.step import Option, Step

LACKS: dict[Option, str] = {
    "target_sparsity": "step with a target_sparsity",
    "expert_size": "split step",
    "tokens": "train step",
    "epochs": "train step",
}
"""Option -> what a recipe lacks of which no step takes it."""


def with_options(
    recipe: Recipe,
    *,
    target_sparsity: float | None = None,
    expert_size: int | None = None,
    tokens: int | None = None,
    epochs: float | None = None,
    data: str | None = None,
    block_length: int | None = None,
    packing: Packing | None = None,
    bos: Bos | None = None,
    seed: int | None = None,
    task: Task | None = None,
) -> Recipe:
    """Returns the recipe under the command line's options; None leaves a value as it is.

    `tokens` or `epochs` is the sum over the train steps, which keep their shares of it: equal ones,
    where none has tokens or epochs of its own.

    Raises:
        ValueError: a value out of range, or an option that no step of the recipe can take.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}, but must be at least 1")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"epochs is {epochs}, but must be a number above 0")
    if tokens is not None and epochs is not None:
        raise ValueError(
            f"{tokens} tokens and {epochs:g} epochs are given, and the two may differ: give one"
        )
    given: dict[Option, Any] = {
        "target_sparsity": target_sparsity,
        "expert_size": expert_size,
        "tokens": tokens,
        "epochs": epochs,
    }
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:  # one that changes nothing is a mistake
        if not any(step.takes(option) for step in recipe.steps):
            raise ValueError(f"recipe {recipe.name} has no {LACKS[option]}")

    def change(step: Step) -> Step:
        for option, value in options.items():
            if step.takes(option):
                step = step.changed(option, _own(step, recipe, option, value))
        return step

    return replace(
        recipe,
        steps=tuple(change(step) for step in recipe.steps),
        data=recipe.data if data is None else data,
        block_length=recipe.block_length if block_length is None else block_length,
        packing=recipe.packing if packing is None else packing,
        bos=recipe.bos if bos is None else bos,
        seed=recipe.seed if seed is None else seed,
        task=recipe.task if task is None else task,
    )


def _own(step: Step, recipe: Recipe, option: Option, value: Any) -> Any:
    """A step's part of what all of them get, where an option says that."""
    if option not in ("tokens", "epochs"):
        return value
    whole = recipe.train_amount()
    share = step.amount / whole if whole else 1 / len(recipe.train_steps)
    return value * share if option == "epochs" else max(1, round(value * share))


def has_control(recipe: Recipe) -> bool:
    """Whether a recipe teaches the donor anything: its own words and routers alone do not."""
    return any(step.control() is not None for step in recipe.steps)


def control_recipe(recipe: Recipe) -> Recipe:
    """The dense control: the same training on the same text without routers, language loss alone.

    A step that trains nothing but routers falls away, and so does one without a language loss;
    those after it see the text from where the step before it stopped.

    Raises:
        ValueError: the recipe teaches the donor nothing.
    """
    controls = [step.control() for step in recipe.steps]
    steps = tuple(step for step in controls if step is not None)
    if not steps:
        parts = {step.parts for step in recipe.train_steps if step.amount}
        if not parts:
            does = "trains nothing"
        elif parts == {"routers"}:
            does = "trains nothing but routers"
        else:
            does = "trains the donor without a language loss (lm)"
        raise ValueError(f"recipe {recipe.name} {does}: its dense control is the donor")
    return replace(recipe, name=f"{recipe.name}-control", steps=steps)
