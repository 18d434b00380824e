"""Tells which rows of a running model are tokens of the text, and which are padding.

The attention mask of the running forward pass says it. Whatever counts tokens asks here.

Letters: B texts of a batch, T tokens of a pass, S tokens that the mask knows: those in the KV cache
come first, C tokens that a token may attend to, K experts that an MoE host chooses for a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_tools.experts.hooks import hooked
from moe_tools.hosts.moe_host import HostExperts


@contextmanager
def valid_tokens(model: nn.Module) -> Iterator[ValidTokens]:
    """While it lasts, says which rows of each forward pass are tokens.

    Every model of transformers inside is asked for the mask that it is given itself: the encoder
    and the decoder of T5 each have their own. No output changes. Without a mask, nothing is
    computed and no device waits.
    """
    tokens = ValidTokens()
    with hooked(tokens.hooks(model)):
        yield tokens


class ValidTokens:
    """Knows which rows are tokens in the forward pass that runs now.

    A copy of a model that it watches is watched by a copy of it.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        """Of a model and of the models inside that run now, the innermost last."""
        self._experts: dict[nn.Module, tuple[nn.Module, int]] = {}
        """Expert of an MoE host -> the module that holds it, and its place there."""
        self._chosen: dict[nn.Module, Tensor] = {}
        """Experts of an MoE host -> which of them it chose for each token, T x K."""

    def of_ffn(self, ffn: nn.Module, x_TD: Tensor) -> Tensor | None:
        """Which of the rows that an FFN gets are tokens.

        Args:
            ffn: the module; an expert of an MoE host gets only some of the rows.
            x_TD: its input, or anything with the same leading dimensions.

        Returns:
            Booleans of these dimensions; None: nobody says that a row is padding.
        """
        shape = x_TD.shape[:-1]
        if ffn not in self._experts:
            return self._all(shape, x_TD.device)
        host, _ = self._experts[ffn]
        if host not in self._chosen:
            return None
        valid_T = self._all(self._chosen[host].shape[:1], x_TD.device)
        return None if valid_T is None else valid_T[self.rows_T(ffn)].view(shape)

    @property
    def shape(self) -> torch.Size | None:
        """(B, T) of the pass that runs now; None: nobody says it."""
        return self._passes[-1].shape if self._passes else None

    def of_ids(self, ids_BT: Tensor) -> Tensor | None:
        """valid_BT of what enters the embedding; None: nobody says that any of it is padding."""
        return self._all(ids_BT.shape, ids_BT.device)

    def rows_T(self, ffn: nn.Module) -> Tensor | None:
        """Which rows an MoE host gives to one of its experts; None: the FFN gets them all."""
        host, index = self._experts.get(ffn, (None, 0))
        if host is None or host not in self._chosen:
            return None
        # the order in which HostExperts hands rows to an expert
        return torch.where((self._chosen[host] == index).T)[1]

    def places(self, ffn: nn.Module, x_TD: Tensor) -> tuple[Tensor, int]:
        """Which tokens of the pass the rows of an FFN are, padding left out.

        Args:
            ffn: the module; an expert of an MoE host gets only some of the rows.
            x_TD: its input, or anything with the same leading dimensions.

        Returns:
            The number of each row that is a token, counted over the tokens of the pass; and how
            many these are.
        """
        rows_T = self.rows_T(ffn)
        if rows_T is None:
            valid_T = self.of_ffn(ffn, x_TD)
            count = x_TD.shape[:-1].numel() if valid_T is None else int(valid_T.sum())
            return torch.arange(count, device=x_TD.device), count
        chosen_TK = self._chosen[self._experts[ffn][0]]
        valid_T = self._all(chosen_TK.shape[:1], x_TD.device)
        if valid_T is None:
            return rows_T, len(chosen_TK)
        return valid_T.cumsum(0)[rows_T[valid_T[rows_T]]] - 1, int(valid_T.sum())

    def count(self, x_TD: Tensor) -> int:
        """How many of the rows that enter any other module are tokens."""
        now = self._passes[-1] if self._passes else None
        if now is not None and x_TD is now.memory:
            now = now.encoder
        rows = x_TD.numel() // x_TD.shape[-1]
        if now is None or now.valid_BT is None or now.valid_BT.numel() != rows:
            return rows
        return now.count

    def _all(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Which rows of this shape are tokens; None if they are not those of the pass."""
        valid_BT = self._passes[-1].valid_BT if self._passes else None
        if valid_BT is None or valid_BT.numel() != shape.numel():
            return None
        return valid_BT.to(device).reshape(shape)

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Begins to watch a model."""
        # torch.compile insists on the number of a hook that is always called, and each has another
        always = model._compiled_call_impl is None
        for module in _outside_experts(model):
            if isinstance(module, HostExperts):
                self._experts |= {expert: (module, i) for i, expert in enumerate(module)}
                yield module.register_forward_pre_hook(self._choose)
            elif module is model or isinstance(module, PreTrainedModel):
                names = parameters_of(type(module).forward)
                if "attention_mask" in names:
                    enter = partial(self._enter, names)
                    yield module.register_forward_pre_hook(enter, with_kwargs=True)
                    yield module.register_forward_hook(self._leave, always_call=always)

    def _enter(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # of a whole encoder-decoder, what is outside its two stacks sees the decoder's tokens
        side = "decoder_" if "decoder_input_ids" in names else ""
        given = dict(zip(names, args, strict=False)) | kwargs
        self._end(module)  # one that failed, where `_leave` is not always called
        outer = self._passes[-1] if self._passes else None
        self._passes.append(_pass(module, given, side, outer))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._end(module)
        if not self._passes:
            self._chosen.clear()

    def _end(self, module: nn.Module) -> None:
        """Ends the pass of a module, if there is one, and those inside it."""
        while any(one.module is module for one in self._passes):
            self._passes.pop()

    def _choose(self, host: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(host, HostExperts)
        self._chosen[host] = host.chosen_TK(args)


@dataclass
class _Pass:
    """A forward pass of one model. Tensors are read when somebody asks, not before."""

    module: nn.Module
    mask: Any
    """The attention mask, as the model got it."""
    shape: torch.Size | None
    """(B, T); None: not known."""
    outer: _Pass | None = None
    """The pass of the model around it, where this mask says nothing of tokens."""
    memory: Tensor | None = None
    """The encoder's output that a decoder attends to."""
    encoder: _Pass | None = None
    """The encoder's tokens, as a pass."""
    kept: list[Tensor | None] = field(default_factory=list)
    """What `valid_BT` found; no cached_property, whose lock in Python 3.11 torch.compile cannot
    enter."""

    @property
    def valid_BT(self) -> Tensor | None:
        """Which tokens are no padding; None: all, or nobody says."""
        if self.mask is None:
            return None
        if not self.kept:
            self.kept.append(self._found())
        return self.kept[0]

    def _found(self) -> Tensor | None:
        masks = self.mask.values() if isinstance(self.mask, Mapping) else [self.mask]
        found = (_read(one, self.shape) for one in masks if isinstance(one, Tensor))
        valid_BT = next((one for one in found if one is not None), None)
        if valid_BT is None and self.outer is not None:
            return self.outer.valid_BT
        return valid_BT

    @cached_property
    def count(self) -> int:
        """How many tokens are no padding."""
        assert self.valid_BT is not None
        return int(self.valid_BT.sum())


def _pass(module: nn.Module, given: Mapping[str, Any], side: str, outer: _Pass | None) -> _Pass:
    ids = given.get(f"{side}input_ids")
    embedded = given.get(f"{side}inputs_embeds")
    shape = None
    if isinstance(ids, Tensor):
        shape = ids.shape
    elif isinstance(embedded, Tensor):
        shape = embedded.shape[:-1]
    memory = given.get("encoder_hidden_states")
    encoder = _Pass(module, given.get("encoder_attention_mask"), None)
    return _Pass(module, given.get(f"{side}attention_mask"), shape, outer, memory, encoder)


def _read(mask: Tensor, shape: torch.Size | None) -> Tensor | None:
    """valid_BT of a mask: (B, S), or (B, 1, T, C) as `generate` makes it for a static cache."""
    if mask.ndim == 2:
        return mask.bool() if shape is None else mask[:, mask.shape[1] - shape[-1] :].bool()
    if mask.ndim != 4 or shape is None or mask.shape[2] != shape[-1]:
        return None
    seen_BTC = mask[:, 0].detach()
    if seen_BTC.dtype != torch.bool:  # added to the scores: the lowest number hides a token
        seen_BTC = seen_BTC > torch.finfo(seen_BTC.dtype).min / 2
    if seen_BTC.shape[1] == seen_BTC.shape[2]:
        valid_BT = seen_BTC.diagonal(dim1=1, dim2=2)  # a token sees itself
    else:
        valid_BT = seen_BTC.any(-1)  # and padding on the left sees nothing
    return valid_BT.expand(shape) if len(valid_BT) in (1, shape[0]) else None


def _outside_experts(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, but for those inside the experts of an MoE host, which are most."""
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        yield module
        if not isinstance(module, HostExperts):
            found = [child for child in module.children() if child not in seen]
            seen.update(found)
            waiting += found


@lru_cache(maxsize=256)
def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a model's forward pass."""
    return tuple(inspect.signature(forward).parameters)[1:]
