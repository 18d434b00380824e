"""Shows every decision of a running model, token by token.

Letters: B rows of a batch, T tokens, D model width, E experts, C tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_tools.data.generate import CACHE_NAMES
from moe_tools.experts.experts import ExpertFFN, Routing
from moe_tools.experts.hooks import hooked
from moe_tools.experts.importance import Importance
from moe_tools.experts.routing import observed_with_input
from moe_tools.experts.tokens import ValidTokens, valid_tokens

BEFORE, AFTER = 12, 4
"""Tokens of context before and after a token."""
NOTHING = -1
"""Placeholder id where the text has no token."""


class Seen(NamedTuple):
    """What one FFN decided in one forward pass; padding is left out."""

    ffn: ExpertFFN
    scores_TE: Tensor
    mask_TE: Tensor
    margin_TE: Tensor
    """Score minus threshold; infinite for shared experts."""
    norm_TE: Tensor | None
    """Output norm ||E_e(x)|| of each expert, whether it ran or not; None: not measured."""
    tokens: Tokens
    row_T: Tensor
    """Which of the pass's tokens these are: all of them, except in an expert of an MoE host."""

    @property
    def number_T(self) -> Tensor:
        """Numbers of these tokens among all tokens."""
        return self.tokens.number_T[self.row_T]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward pass of one stack of layers, without padding."""

    ids_T: Tensor
    number_T: Tensor
    """Numbers of the tokens among all, in the order they were seen."""
    window_TC: Tensor
    """Each token between the `BEFORE` tokens before and the `AFTER` after it; `NOTHING`: none."""
    valid_T: Tensor
    """Which tokens of the batch (B x T flattened, padding included) these are."""


@dataclass
class _State:
    """What is known of the running pass."""

    valid: ValidTokens
    continues: bool = False
    """Whether the pass continues a KV cache."""
    history_BC: Tensor | None = None
    count: int = 0
    tokens: Tokens | None = None


@contextmanager
def watch(
    model: PreTrainedModel,
    ffns: Mapping[str, ExpertFFN],
    *,
    see: Callable[[Seen], None],
    begin: Callable[[Tokens], None],
    norms: bool,
) -> Iterator[None]:
    """While it lasts, `begin` is shown the tokens of each pass, `see` each FFN's decisions on them.

    No output changes; afterwards no hook or observer is left. Tokens are what enters the input
    embedding, so generation with a KV cache shows every token once. The attention mask says what is
    padding.

    Raises:
        ValueError: the model runs on embeddings instead of tokens.
    """
    with ExitStack() as stack:
        state = _State(stack.enter_context(valid_tokens(model)))
        stack.enter_context(hooked(_hooks(model, state, begin)))
        for ffn in ffns.values():
            observe = _observing(ffn, state, see, norms)
            stack.enter_context(observed_with_input(ffn, state.valid, observe))
        yield


def _hooks(
    model: PreTrainedModel, state: _State, begin: Callable[[Tokens], None]
) -> Iterator[RemovableHandle]:
    def enter(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        state.continues = cache is not None and cache.get_seq_length() > 0

    def leave(*_: Any) -> None:
        state.tokens, state.continues = None, False

    def embed(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        state.tokens = _read(state, args[0].detach())
        begin(state.tokens)

    yield model.register_forward_pre_hook(enter, with_kwargs=True)
    yield model.register_forward_hook(leave, always_call=True)
    weight = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is weight:
            yield module.register_forward_pre_hook(embed)


def _observing(
    ffn: ExpertFFN, state: _State, see: Callable[[Seen], None], norms: bool
) -> Callable[[Routing, Tensor], None]:
    @torch.no_grad()
    def observe(routing: Routing, x_TD: Tensor) -> None:
        measured = norms and ffn.packed is None
        norm_TE = _norm_TE(ffn, routing.of_tokens(x_TD.detach())) if measured else None
        see(_seen(ffn, routing, norm_TE, state))

    return observe


def _seen(ffn: ExpertFFN, routing: Routing, norm_TE: Tensor | None, state: _State) -> Seen:
    tokens = state.tokens
    scores_TE = routing.of_tokens(routing.scores_TE.detach())
    row_T = state.valid.rows_T(ffn)
    rows = routing.mask_TE[..., 0].numel()
    if tokens is None or (row_T is None and rows != len(tokens.valid_T)):
        raise ValueError(f"{ffn.name} ran on inputs that are no tokens: pass input_ids")
    if row_T is None:
        row_T = torch.arange(rows, device=scores_TE.device)
    if routing.valid_T is not None:
        row_T = row_T[routing.valid_T.flatten()]
    packed_T = tokens.valid_T.cumsum(0) - 1  # where a token of the batch is without the padding
    return Seen(
        ffn,
        scores_TE,
        routing.of_tokens(routing.mask_TE.detach()),
        margin_TE(ffn, scores_TE),
        norm_TE,
        tokens,
        packed_T[row_T],
    )


def margin_TE(ffn: ExpertFFN, scores_TE: Tensor) -> Tensor:
    """Score minus the token's threshold; infinite for shared experts."""
    scores_TR = scores_TE[..., ffn.shared :]
    margin_TR = scores_TR - ffn.selector.threshold_T1(scores_TR)
    return nn.functional.pad(margin_TR, (ffn.shared, 0), value=torch.inf)


def _norm_TE(ffn: ExpertFFN, x_TD: Tensor) -> Tensor:
    """Output norm ||E_e(x)|| of every expert, shared ones included (D2DMoE, arXiv 2310.04361)."""
    down_FD = ffn.weights().down_FD
    return Importance(ffn.division, 0, down_FD, ffn.off_F).norm_TR(ffn.hidden(x_TD))


def _read(state: _State, ids_BT: Tensor) -> Tokens:
    rows = len(ids_BT)
    valid_BT = state.valid.of_ids(ids_BT)
    if valid_BT is None:
        valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    known_BT = ids_BT.masked_fill(~valid_BT, NOTHING)
    history_BC = state.history_BC
    if not state.continues or history_BC is None or len(history_BC) != rows:
        history_BC = ids_BT.new_full((rows, BEFORE), NOTHING)
    text_BT = torch.cat([history_BC, known_BT], dim=1)
    state.history_BC = text_BT[:, -BEFORE:]
    window_BTC = nn.functional.pad(text_BT, (0, AFTER), value=NOTHING).unfold(
        1, BEFORE + 1 + AFTER, 1
    )
    valid_T = valid_BT.flatten()
    count = int(valid_T.sum())
    number_T = torch.arange(state.count, state.count + count, device=ids_BT.device)
    state.count += count
    return Tokens(ids_BT[valid_BT], number_T, window_BTC.flatten(0, 1)[valid_T], valid_T)
