"""How a model computes attention while it is trained: transformers' own ways, by their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from moe_tools.checkpoint.quiet import quiet_transformers


@contextmanager
def attention(model: PreTrainedModel | None, name: str | None) -> Iterator[None]:
    """While it lasts, a model computes attention in one of `moe_tools.steps.launch.ATTENTIONS`.

    Args:
        model: changes nothing but how; None: there is none.
        name: None leaves it as it is.

    Raises:
        ValueError: this model cannot.
    """
    if model is None or name is None:
        yield
        return
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        _set(model, name)
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


def _set(model: PreTrainedModel, name: str) -> None:
    """Sets it, where transformers would warn and go on with another."""
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} cannot take --attention {name}: {reason}"
        ) from error
    for config in _configs(model):
        if config._attn_implementation != name:
            raise ValueError(
                f"{type(model).__name__} cannot take --attention {name}: it stays with "
                f"{config._attn_implementation}"
            )


def _configs(model: PreTrainedModel) -> list[Any]:
    """Of the model and of the models inside it, each once."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(one.config): one.config for one in models}.values())
