"""The one model that a server has, and its tokenizer."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.checkpoint.loading import load, load_tokenizer, prompt_share
from moe_tools.data.limits import context_length, continues_text, text_config
from moe_tools.inference.optimized import optimize
from moe_tools.inference.packed_linear import Kind
from moe_tools.registry import short
from moe_tools.serving.refusal import Refusal
from moe_tools.serving.sampling import Sampling, unread
from moe_tools.typed import fits

_log = logging.getLogger(__name__)

TEMPLATE_CALL = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""What `apply_chat_template` itself takes: no client may say it."""


@dataclass(frozen=True)
class Packing:
    """Arguments of `moe_tools.optimize`."""

    dtype: torch.dtype | None = None
    linears: Kind | None = None
    screen: float | None = None


@dataclass(frozen=True)
class Hosted:
    """A model that answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """As it was given on the command line."""
    name: str
    """What clients call it; they may say the source, too."""
    ends: frozenset[int]
    """Tokens that end a text."""
    sampling: Sampling
    """How its tokens are chosen where a request says nothing."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer at most."""
        return context_length(self.model)

    def check_name(self, name: str | None) -> None:
        """Whether a request means this model; nothing else is ever loaded.

        Raises:
            Refusal: another one.
        """
        if name is not None and name not in (self.name, self.source):
            raise Refusal(
                404,
                f"the model {short(name, 100)} is not served here: {self.name!r} is",
                param="model",
                code="model_not_found",
            )

    def encode(self, text: str | list[int]) -> list[int]:
        """The tokens of a prompt.

        Raises:
            Refusal: there is none, or one outside the vocabulary.
        """
        if isinstance(text, str):
            tokens = list(self.tokenizer(text, verbose=False)["input_ids"])
        else:
            tokens = text
        size = int(text_config(self.model).vocab_size)
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise Refusal(
                400, f"token {wrong} is outside the vocabulary of {size} tokens", param="prompt"
            )
        if not tokens:
            raise Refusal(400, "the prompt has no token: send some text", param="prompt")
        return tokens

    def encode_chat(self, turns: list[dict[str, Any]], extra: dict[str, Any]) -> list[int]:
        """The tokens of a talk, in the model's own template.

        Raises:
            Refusal: there is no template, or it refuses these turns.
        """
        if not self.tokenizer.chat_template:
            raise Refusal(
                400, f"{self.name!r} has no chat template: use /v1/completions", param="messages"
            )
        for key in extra:
            if key in TEMPLATE_CALL:  # another template, say, which is a program
                raise Refusal(
                    400,
                    f"{short(key, 60)} is not the template's to read: leave it out",
                    param="chat_template_kwargs",
                )
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **extra
            )
        except Exception as error:  # a template is a program, and fails in ways of its own
            said = short(f"{type(error).__name__}: {error}", 200)
            raise Refusal(
                400, f"the chat template refuses these messages: {said}", param="messages"
            ) from error
        found = self.tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"]
        return self.encode(list(found))


def host(
    source: str,
    *,
    name: str | None,
    dtype: torch.dtype,
    device: str,
    packing: Packing | None,
) -> Hosted:
    """Loads what is to be served.

    Args:
        source: a folder, converted or dense, or what else `moe_tools.load` takes.
        name: what clients call it; by default the last part of the source.
        dtype: of the weights.
        device: where to.
        packing: how to pack it for the sparse kernels; None: not.

    Raises:
        ValueError: nothing there, no tokenizer, or a model that continues no text or cannot be
            packed.
    """
    if packing is not None and prompt_share(source) is not None:
        raise ValueError(
            f"{source} selects its neurons by the prompt, and a smaller dense FFN goes on: "
            "--optimize does not pack that, leave it out"
        )
    model = load(source, dtype=dtype, device=device)
    tokenizer = load_tokenizer(source)
    if not continues_text(model):
        raise ValueError(f"{type(model).__name__} continues no text: serve a causal model")
    ends = _ends(model, tokenizer, source)
    if packing is not None:
        optimize(model, dtype=packing.dtype, linears=packing.linears, screen=packing.screen)
    last = Path(os.path.abspath(source)).name
    usual = Sampling.of_model(model.generation_config)
    if ignored := unread(model.generation_config):
        _log.warning("%s of generation_config.json is not read here", ", ".join(ignored))
    return Hosted(model, tokenizer, source, name or last, ends, usual)


def _ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> frozenset[int]:
    """By `generation_config.json`, which may be anybody's; else by the tokenizer."""
    said = getattr(model.generation_config, "eos_token_id", None)
    if not fits(said, int | list[int] | None):
        raise ValueError(
            f"eos_token_id in generation_config.json of {source} is {said!r}, and must be the "
            "number of a token, or a list of some"
        )
    if said is None:
        said = tokenizer.eos_token_id
    tokens = [] if said is None else [said] if isinstance(said, int) else said
    return frozenset(token for token in tokens if token >= 0)
