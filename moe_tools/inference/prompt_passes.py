"""Tells the passes over a prompt from those that continue it, from the arguments of a model alone.

Letters: B sequences of a batch, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from moe_tools.data.generate import CACHE_NAMES
from moe_tools.experts.tokens import ValidTokens, parameters_of


class PromptPasses:
    """Knows whether the pass that runs now is one over a prompt.

    A pass without anything in the KV cache begins a prompt. One with more than one new token a
    sequence goes on with it: a further chunk, or the next turn of a talk. One with a single new
    token continues the text.
    """

    def __init__(self) -> None:
        self.tokens = ValidTokens()
        self.prompts = 0
        """How many prompts have begun."""
        self.chunks = 0
        """How many passes were over prompts."""
        self.batch = 0
        """B of the prompt."""
        self.continues = False
        """Whether the pass that runs now continues the text."""
        self._length = 0
        """Tokens of each sequence so far."""
        self._cache: int | None = None
        """The id of the KV cache that has them; None: not known."""
        self._running: list[nn.Module] = []

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Begins to watch a model.

        Raises:
            ValueError: it does not tell what is a prompt, as it has no KV cache.
        """
        watched = [module for module in model.modules() if _has_cache(module)]
        if not watched:
            raise ValueError(
                f"{type(model).__name__} has no KV cache, which tells a prompt from what follows "
                "it: select by the prompt in a causal language model"
            )
        for module in watched:
            enter = partial(self._enter, parameters_of(type(module).forward))
            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            yield module.register_forward_hook(self._leave, always_call=True)
        yield from self.tokens.hooks(model)

    def forget(self) -> None:
        """Forgets the prompt: what was kept of it is gone."""
        self._length, self._cache = 0, None

    def _enter(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._running.append(module)
        if len(self._running) == 1:  # a head hands the same arguments on to its body
            self._begin(dict(zip(names, args, strict=False)) | kwargs)

    def _begin(self, given: Mapping[str, Any]) -> None:
        batch, new = _shape(given)
        cache = _cache_in(given)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            self.prompts += 1
            self.batch = batch
        else:
            self._check(past, batch, new, cache)
        self.continues = past > 0 and new == 1
        self.chunks += not self.continues
        self._length, self._cache = past + new, None if cache is None else id(cache)

    def _check(self, past: int, batch: int, new: int, cache: Cache | None) -> None:
        if past != self._length or self._cache not in (None, id(cache)):
            raise ValueError(
                f"the KV cache holds {past} tokens, but the prompt that neurons were selected by "
                f"has {self._length} with what followed it: run every prompt from its start, one "
                "batch to its end before the next, without an assistant model or prompt lookup"
            )
        if new > 1 and batch != self.batch:
            raise ValueError(
                f"a prompt of {self.batch} sequences goes on with {batch}: run it anew with all"
            )

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self._running or self._running[-1] is not module:
            return  # it failed before it entered
        self._running.pop()
        if not self._running and isinstance(output, Mapping):
            made = _cache_in(output)
            self._cache = self._cache if made is None else id(made)


def _has_cache(module: nn.Module) -> bool:
    """Whether a module is a model that reads tokens and keeps a KV cache."""
    if not isinstance(module, PreTrainedModel):
        return False
    names = parameters_of(type(module).forward)
    return "input_ids" in names and any(name in names for name in CACHE_NAMES)


def _shape(given: Mapping[str, Any]) -> tuple[int, int]:
    """B and T of a pass."""
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    found = ids if isinstance(ids, Tensor) else embedded
    assert isinstance(found, Tensor)
    return found.shape[0], found.shape[1]


def _cache_in(given: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a pass, or in what it gives.

    Raises:
        ValueError: one that does not say how many tokens it holds.
    """
    found = (given.get(name) for name in CACHE_NAMES)
    cache = next((one for one in found if one is not None), None)
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"a {type(cache).__name__} does not tell a prompt from what follows it: neurons are "
            "selected by the prompt with a transformers.Cache"
        )
    return cache
