"""The held-out text of a run, which its train steps look at and never learn from."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.data import Text
from moe_tools.data.limits import check_text
from moe_tools.recipe import Recipe
from moe_tools.report.setup import Setup, held_out


def held_out_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Text:
    """About so many tokens of the held-out part of a recipe's text, as `evaluate` reads them.

    Raises:
        ValueError: there is none.
    """
    setup = Setup(held_out(recipe.data), tokens, recipe.block_length, bos=recipe.bos)
    return setup.text(tokenizer, recipe.task)


def check_held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Reads what the train steps of a recipe will look at, better before the run than in it.

    Raises:
        ValueError: there is no such text, or the model, maybe empty, cannot take it.
    """
    wanted = [step.evaluate_tokens for step in recipe.train_steps if step.evaluate_every]
    if wanted:
        check_text(model, held_out_text(recipe, tokenizer, max(wanted)))
