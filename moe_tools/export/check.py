"""Compares an export with the model that it was made from: FFN by FFN, and in perplexity.

Whole models that choose cannot be compared logit by logit: one near tie that falls otherwise, by
the last digit of a sum, changes what all later layers see. So every FFN is given our inputs, and
of the whole model, for which attention, positions and head have to be right as well, only the
median of the logits' errors is held, and the perplexity, both to a limit that no mistake passes.

Letters: B blocks, T tokens, D model width, R experts that are routed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.data.progress import progress
from moe_tools.experts.conversion import set_selectors
from moe_tools.experts.experts import ExpertFFN, Routing, every_expert_on, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.routing import observed
from moe_tools.experts.selectors import TopK
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.export.llamas import logits_of
from moe_tools.export.plan import Limits, Options, Plan, Written
from moe_tools.export.source import Source

FFN_TOKENS = 256
"""Tokens on which the FFNs are compared, at most, and one block at least."""

Logits = Callable[[Tensor], Tensor]
"""ids_BT -> logits_BTV."""


@dataclass(frozen=True)
class Figures:
    """What was compared."""

    tokens: int
    text: str | None
    """Where the tokens are from; None: drawn at random, which gives no perplexity."""
    token_layers: int
    """Tokens times layers whose FFNs were compared; 0: a model without a choice, by its logits."""
    error: float
    """Mean of ||y' - y|| / ||y|| over the FFNs' outputs where both choose alike, or of logits."""
    median: float
    """Of the whole model's logits' errors, over their norm."""
    sets_equal: float | None = None
    """Share of these that choose the same experts; None: there is no choice."""
    decisions_equal: float | None = None
    """Share of the single decisions, an expert of a token, that are the same."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """By model and dtype. `own selector`: ours before `--top-k`; `every expert`: ours, dense."""

    def lines(self) -> list[str]:
        """What a user reads."""
        if self.sets_equal is None:
            said = [f"logits: {self.error:.2g} of their norm from ours"]
        else:
            said = [
                f"FFNs: the same experts in {self.sets_equal:.2%} of {self.token_layers:,} "
                f"token-layers ({self.decisions_equal:.3%} of single decisions), outputs "
                f"{self.error:.2g} of their norm from ours there"
            ]
        if self.perplexity:
            said.append(f"perplexity of {self.tokens:,} tokens of {self.text}:")
            said += [f"  {name}: {value:.4f}" for name, value in self.perplexity.items()]
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check(
    plan: Plan, source: Source, options: Options, place: Path, ids_BT: Tensor, text: str | None
) -> Figures:
    """Compares what was written with its source, all in fp32, and perplexities in bf16 as well.

    The models are in memory in fp32, one after the other.

    Args:
        plan: of what was written.
        source: what it was made from.
        options: of the export.
        place: where it is.
        ids_BT: blocks of tokens.
        text: where these are from; None: at random.

    Raises:
        ValueError: it differs from ours by more than the plan allows.
    """
    few_BT = ids_BT[: max(1, FFN_TOKENS // ids_BT.shape[1])]
    ours = _load(plan, source, options, plan.weights_dtype).float()
    seen = _watch(ours, few_BT) if plan.routed else []
    logits_BTV = logits_of(ours, few_BT)
    perplexity = {} if text is None else _perplexities(ours, ids_BT)
    del ours
    if text is not None and options.top_k is not None:
        own = load(source.name, dtype=plan.weights_dtype).float()
        perplexity["own selector fp32"] = _perplexity(partial(logits_of, own), ids_BT)
        del own
    written = plan.read_back(place, torch.float32)
    assert written is not None
    errors_BT = _errors_T(written.logits(few_BT).float(), logits_BTV.float())
    if plan.routed:
        error, sets, decisions = _compare(seen, written)
    else:
        error, sets, decisions = float(errors_BT.mean()), None, None
    if text is not None:
        perplexity["written fp32"] = _perplexity(written.logits, ids_BT)
    token_layers, median = sum(len(one.x_TD) for one in seen), float(errors_BT.median())
    figures = Figures(
        ids_BT.numel(), text, token_layers, error, median, sets, decisions, perplexity
    )
    _hold(figures, plan.limits)
    del written
    if text is not None:
        ours = _load(plan, source, options, torch.bfloat16)
        perplexity["ours bf16"] = _perplexity(partial(logits_of, ours), ids_BT)
        del ours
        if (low := plan.read_back(place, torch.bfloat16)) is not None:
            perplexity["written bf16"] = _perplexity(low.logits, ids_BT)
    return figures


def _load(
    plan: Plan, source: Source, options: Options, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Our model as it is exported; routers stay in fp32 under every dtype."""
    model = load(source.name, dtype=dtype, routed=plan.routed)
    if options.top_k is not None:
        set_selectors(model, [TopK(options.top_k)] * len(expert_ffns(model)))
    return model


def _perplexities(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, float]:
    """Of our model in fp32, as it is exported and dense."""
    found = {"ours fp32": _perplexity(partial(logits_of, model), ids_BT)}
    if expert_ffns(model):
        with every_expert_on(model):
            found["every expert fp32"] = _perplexity(partial(logits_of, model), ids_BT)
    return found


def _perplexity(logits: Logits, ids_BT: Tensor) -> float:
    """Of every token but the first of each block, after those before it."""
    nats = 0.0
    with progress("check", len(ids_BT), "block") as bar:
        for ids_T in ids_BT:
            logits_TV = logits(ids_T[None])[0, :-1].float()
            nats += float(nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
            bar.update(1)
    return math.exp(nats / (ids_BT.numel() - len(ids_BT)))


@dataclass
class _Seen:
    """What one of our FFNs got and gave."""

    x_TD: Tensor
    residual_TD: Tensor
    """What the norm before it got."""
    y_TD: Tensor
    mask_TR: Tensor


@torch.no_grad()
def _watch(model: PreTrainedModel, ids_BT: Tensor) -> list[_Seen]:
    """Runs our model, and keeps what its FFNs did."""
    ffns = expert_ffns(model)
    layers: Any = model.base_model.layers
    with ExitStack() as stack:
        tokens = stack.enter_context(valid_tokens(model))
        watchers = [
            stack.enter_context(_watching(ffn, layer, tokens))
            for ffn, layer in zip(ffns, layers, strict=True)
        ]
        model(input_ids=ids_BT, use_cache=False)
    return [_Seen(**watcher) for watcher in watchers]


@contextmanager
def _watching(ffn: ExpertFFN, layer: nn.Module, tokens: ValidTokens) -> Iterator[dict[str, Tensor]]:
    """While it lasts, fills the fields of a `_Seen`."""
    kept: dict[str, Tensor] = {}

    def keep_ffn(_: nn.Module, args: tuple[Tensor, ...], y_TD: Tensor) -> None:
        kept["x_TD"], kept["y_TD"] = args[0].flatten(0, -2), y_TD.flatten(0, -2)

    def keep_residual(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["residual_TD"] = args[0].flatten(0, -2)

    def keep_mask(routing: Routing) -> None:
        kept["mask_TR"] = routing.mask_TE[..., routing.shared :].flatten(0, -2)

    norm: Any = layer.post_attention_layernorm
    hooks = [
        ffn.register_forward_hook(keep_ffn),
        norm.register_forward_pre_hook(keep_residual),
    ]
    with hooked(hooks), observed(ffn, tokens, keep_mask):
        yield kept


def _compare(seen: list[_Seen], written: Written) -> tuple[float, float, float]:
    """The mean error of y where all is chosen alike, the share of that, and of single decisions."""
    alike, errors, decisions = [], [], []
    with progress("check", len(seen), "FFN") as bar:
        for layer, one in enumerate(seen):
            y_TD, chosen_TR = written.ffn(layer, one.x_TD, one.residual_TD)
            assert chosen_TR is not None
            same_TR = chosen_TR.eq(one.mask_TR)
            same_T = same_TR.all(-1)
            alike.append(same_T)
            decisions.append(same_TR.float().mean())
            errors.append(_errors_T(y_TD[same_T], one.y_TD[same_T]))
            bar.update(1)
    error = torch.cat(errors).mean() if any(map(len, errors)) else torch.tensor(math.inf)
    return (
        float(error),
        float(torch.cat(alike).float().mean()),
        float(torch.stack(decisions).mean()),
    )


def _errors_T(y_TD: Tensor, wanted_TD: Tensor) -> Tensor:
    """||y' - y|| / ||y||; of what is 0 in both, 0."""
    off_T = (y_TD - wanted_TD).norm(dim=-1)
    return off_T / wanted_TD.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _worse(perplexity: dict[str, float]) -> float | None:
    """The logarithm of what was written over ours; None: not measured."""
    if "written fp32" not in perplexity:
        return None
    return math.log(perplexity["written fp32"] / perplexity["ours fp32"])


def _hold(figures: Figures, limits: Limits | None) -> None:
    """Checks the figures against their limits.

    Raises:
        ValueError: one is off.
    """
    if limits is None:
        return
    choices = (
        (figures.sets_equal, limits.sets, "the same experts in {:.2%} of token-layers"),
        (figures.decisions_equal, limits.decisions, "{:.3%} of the decisions alike"),
    )
    wrong = [
        f"{words.format(found)} (at least {least:.6g})"
        for found, least, words in choices
        if found is not None and found < least
    ]
    if not figures.median <= limits.median:
        wrong.append(f"half of its logits {figures.median:.2g} of their norm apart or more")
    if (worse := _worse(figures.perplexity)) is not None and not abs(worse) <= limits.worse:
        wrong.append(f"a perplexity {math.exp(worse):.3g} times ours")
    if not figures.error <= limits.error:
        wrong.append(f"outputs {figures.error:.2g} of their norm apart (at most {limits.error:g})")
    if wrong:
        raise ValueError(
            f"what was written computes another model: {', '.join(wrong)}; nothing is kept: "
            "--no-check writes it all the same"
        )
