"""How long the blocks of a text may be for a model, from its config alone."""

from __future__ import annotations

import logging

from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.data.limits import check_length, context_length
from moe_tools.data.tasks import Task

logger = logging.getLogger(__name__)

DEFAULT = 512
"""Tokens of a block, where nobody says another length."""


def fitting_length(source: str, wanted: int = DEFAULT, *, task: Task = "lm") -> int:
    """The wanted length, or the model's context if that is shorter; one line is logged then.

    A source whose config cannot be read keeps what is wanted: to load it says what is wrong.
    """
    try:
        model = skeleton(source, task=task)
    except ValueError:
        return wanted
    context = context_length(model)
    if context is None or wanted <= context:
        return wanted
    logger.warning(
        "the context of %s is %d tokens: blocks have this length, and not %d",
        *(type(model).__name__, context, wanted),
    )
    return context


def chosen_length(source: str, given: int | None, wanted: int = DEFAULT) -> int:
    """The length that the user gave, else the longest up to what is wanted.

    Raises:
        ValueError: the one that was given exceeds the model's context.
    """
    if given is None:
        return fitting_length(source, wanted)
    check_given(source, given)
    return given


def check_given(source: str, length: int) -> None:
    """Refuses a length that the user gave, if it exceeds the model's context.

    Raises:
        ValueError: so.
    """
    try:
        model = skeleton(source)
    except ValueError:  # to load it says what is wrong
        return
    check_length(model, length)
