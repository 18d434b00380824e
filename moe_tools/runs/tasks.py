"""Which model a task is for, and how the donor of a run is loaded for it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load, load_classifier, load_regressor
from moe_tools.data import label_names
from moe_tools.data.examples import read_scored
from moe_tools.data.limits import says_targets
from moe_tools.recipe import Recipe


def check_task(recipe: Recipe, model: PreTrainedModel) -> None:
    """Whether a donor, maybe without weights, is of the kind that a recipe's task needs.

    Raises:
        ValueError: it is none.
    """
    name, task = type(model).__name__, recipe.task
    if recipe.data == "self" and task != "lm":
        raise ValueError(
            f"data is 'self', samples of the donor, which say nothing for task: {task}: give a file"
        )
    if task == "seq2seq":
        if not says_targets(model):
            raise ValueError(
                f"{name} is no encoder-decoder that makes its decoder's input from labels, as T5 "
                "and BART do, and task: seq2seq needs one: use task: lm"
            )
        missing = [key for key in SHIFTS if getattr(model.config, key, None) is None]
        if missing:
            raise ValueError(
                f"the config of {name} has no {missing[0]}, from which targets are shifted: "
                f"set config.{missing[0]}"
            )
    elif task == "lm" and recipe.train_steps and model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, and does not learn the next token of running text: use "
            "task: seq2seq and data of two columns, a source and its target"
        )


SHIFTS = ("decoder_start_token_id", "pad_token_id")
"""What a decoder's input begins with, and what stands behind its end."""


def load_donor(recipe: Recipe, source: str, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Loads the dense model that a run starts from, with the head of its task.

    Raises:
        ValueError: as `load`, a head of another task, or a label that is none.
    """
    if recipe.task == "classify":
        labels = label_names(recipe.data)
        return load_classifier(source, labels, dtype=dtype, device=device)
    if recipe.task == "regress":
        read_scored(recipe.data)  # better said before the weights are read
        return load_regressor(source, dtype=dtype, device=device)
    return load(source, dtype=dtype, device=device)
