"""Makes recipes from recipes: under the options of a command line, and the dense control."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

from moe_tools.recipe.recipe import Recipe
from moe_tools.recipe.step import Budget, Split, Step, Train


def with_options(
    recipe: Recipe,
    *,
    target_sparsity: float | None = None,
    expert_size: int | None = None,
    tokens: int | None = None,
    data: str | None = None,
    block_length: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """Returns the recipe under the command line's options; None leaves a value as it is.

    `tokens` is the sum over the train steps, which keep their shares of it.

    Raises:
        ValueError: a value out of range, or an option that no step of the recipe can take.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}, but must be at least 1")
    _require_takers(recipe, target_sparsity, expert_size, tokens)
    shrink = 1.0 if tokens is None else tokens / recipe.train_tokens()

    def change(step: Step) -> Step:
        if isinstance(step, Split) and expert_size is not None:
            return replace(step, expert_size=expert_size)
        if isinstance(step, Train):
            step = replace(step, tokens=max(1, round(step.tokens * shrink)))
        if target_sparsity is not None and _has_target(step):
            step = replace(step, target_sparsity=target_sparsity)
        return step

    return replace(
        recipe,
        steps=tuple(change(step) for step in recipe.steps),
        data=recipe.data if data is None else data,
        block_length=recipe.block_length if block_length is None else block_length,
        seed=recipe.seed if seed is None else seed,
    )


def _has_target(step: Step) -> TypeGuard[Train | Budget]:
    return isinstance(step, Train | Budget) and step.target_sparsity is not None


def _require_takers(
    recipe: Recipe, target_sparsity: float | None, expert_size: int | None, tokens: int | None
) -> None:
    """Refuses an option that would change nothing."""
    trains = [step for step in recipe.steps if isinstance(step, Train)]
    splits = [step for step in recipe.steps if isinstance(step, Split)]
    targets = [step for step in recipe.steps if _has_target(step)]
    for option, takers, lacks in (
        (target_sparsity, targets, "step with a target_sparsity"),
        (expert_size, splits, "split step"),
        (tokens, trains, "train step"),
    ):
        if option is not None and not takers:
            raise ValueError(f"recipe {recipe.name} has no {lacks}")


def control_recipe(recipe: Recipe) -> Recipe:
    """Returns the dense control: the train steps, without a router, on the language loss alone.

    A step that trains nothing but routers falls away; those after it see the text from where the
    step before it stopped.

    Raises:
        ValueError: the recipe trains nothing of the donor.
    """
    trains = [step for step in recipe.steps if isinstance(step, Train)]
    dense = tuple(_dense(step) for step in trains if step.parts != "routers")
    if not dense:
        nothing = "nothing but routers" if trains else "nothing"
        raise ValueError(f"recipe {recipe.name} trains {nothing}: its dense control is the donor")
    return replace(recipe, name=f"{recipe.name}-control", steps=dense)


ROUTING = ("mode", "losses", "target_sparsity", "drive", "ramp", "router_lr")
"""Fields of a train step that lead to sparsity. All others say how a model is trained: a control
has them too."""


def _dense(step: Train) -> Train:
    """Returns a train step with the default of every field in `ROUTING`."""
    default = Train(tokens=step.tokens)
    return replace(step, **{name: getattr(default, name) for name in ROUTING})
