"""A recipe's steps without text and without training: every error that words alone can make.

A model that has been through it has the modules that the real steps would give it, with numbers
that mean nothing; on the meta device it needs no numbers at all.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, conversion_so_far, write_conversion
from moe_tools.hosts.ffn import find_ffns
from moe_tools.recipe import Attach, Budget, Recipe, Split, Step, Swap, Train
from moe_tools.steps.attach import rehearse_attach
from moe_tools.steps.calibrate import check_routed, check_sparsity
from moe_tools.steps.split import planned_division
from moe_tools.steps.swap import rehearse_swap
from moe_tools.training.train import check_train


def rehearse(recipe: Recipe, model: PreTrainedModel, donor: str) -> None:
    """Every step's own checks, in order; `donor` is the name that the conversion will keep.

    Raises:
        ValueError: as the steps themselves, where it does not depend on the text.
    """
    for step in recipe.steps:
        rehearse_step(step, model, donor)


def rehearse_step(step: Step, model: PreTrainedModel, donor: str) -> None:
    """The same of one step, on a model that has been through those before it.

    Raises:
        ValueError: as `rehearse`.
    """
    if isinstance(step, Swap):
        rehearse_swap(model, step, conversion_so_far(model, donor))
    elif isinstance(step, Split):
        for ffn in find_ffns(model):
            planned_division(ffn, step)
        write_conversion(model, with_split(conversion_so_far(model, donor), step))
    elif isinstance(step, Attach):
        rehearse_attach(model, step, conversion_so_far(model, donor))
    elif isinstance(step, Train):
        check_train(model, step, donor=model)
    elif isinstance(step, Budget):
        check_sparsity(check_routed(model, "budget"), step.target_sparsity)
    else:
        check_routed(model, "fit")


def with_split(so_far: Conversion, step: Split) -> Conversion:
    """What a model's config says after a split."""
    return replace(so_far, expert_size=step.expert_size, shared_experts=step.shared_experts)
