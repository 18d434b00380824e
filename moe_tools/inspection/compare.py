"""Compares two inspections, and a model with and without an intervention.

Letters: T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.data.generate import evaluating
from moe_tools.data.limits import continues_text
from moe_tools.experts.intervene import intervene
from moe_tools.inspection.inspection import Inspection
from moe_tools.inspection.records import Effect, Overlap
from moe_tools.inspection.run import encode
from moe_tools.inspection.table import Table


def overlap(one: Inspection, other: Inspection) -> Table[Overlap]:
    """How alike two inspections are, FFN by FFN: two texts, or two checkpoints on one text.

    Experts are compared by their index. Between checkpoints that makes sense where both have the
    same split, such as two stages of one training.

    Raises:
        ValueError: the two did not look at the same FFNs, or those have other experts.
    """
    if list(one.ffns) != list(other.ffns):
        raise ValueError(
            f"the inspections are of other FFNs, {len(one.ffns)} and {len(other.ffns)}: inspect "
            "models of one host, with the same ffns"
        )
    same_text = torch.equal(one.kept.ids_T, other.kept.ids_T)
    return Table.of(Overlap, (_overlap(name, one, other, same_text) for name in one.ffns))


def _overlap(name: str, one: Inspection, other: Inspection, same_text: bool) -> Overlap:
    a, b = one.tallies[name], other.tallies[name]
    if a.division != b.division:
        raise ValueError(
            f"{name} has {a.division.num_experts} and {b.division.num_experts} experts: they do "
            "not compare"
        )
    share_E, other_E = (t.load_E.double() / max(1, int(t.load_E.sum())) for t in (a, b))
    used_E, other_used_E = a.load_E > 0, b.load_E > 0
    return Overlap(
        name,
        load=torch.minimum(share_E, other_E).sum().item(),
        used=_jaccard_T(used_E[None], other_used_E[None]).item(),
        mask=_mask_overlap(name, one, other) if same_text else math.nan,
    )


def _mask_overlap(name: str, one: Inspection, other: Inspection) -> float:
    a, b = one.kept.of(name), other.kept.of(name)
    if a is None or b is None or not torch.equal(a.number_T, b.number_T):
        return math.nan  # an MoE host sent other tokens here
    return _jaccard_T(a.mask_TE, b.mask_TE).mean().item()


def _jaccard_T(mask_TE: Tensor, other_TE: Tensor) -> Tensor:
    """Jaccard index of two masks, token by token: |both| / |either|; 1 where both are empty."""
    both_T, either_T = (mask_TE & other_TE).sum(1), (mask_TE | other_TE).sum(1)
    return torch.where(either_T > 0, both_T / either_T.clamp_min(1), 1.0)


@torch.no_grad()
def effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    **interventions: object,
) -> Table[Effect]:
    """What an intervention does to a causal model's prediction of every token but the first.

    Args:
        model: routed.
        tokenizer: the model's.
        text: within the context.
        **interventions: those of `intervene`, e.g. off={3: [17]} or tau=0.7.

    Raises:
        ValueError: as `inspect` and `intervene`; a model that is not causal; one token only.
    """
    if not continues_text(model):
        raise ValueError(f"{type(model).__name__} does not predict the next token")
    ids_BT = encode(model, tokenizer, text).to(model.device)
    if ids_BT.shape[1] < 2:
        raise ValueError(f"{text!r} is one token: there is no next one to predict")
    with evaluating(model):
        before_TV = _log_p_TV(model, ids_BT)
        with intervene(model, **interventions):  # type: ignore[arg-type]
            after_TV = _log_p_TV(model, ids_BT)
    target_T1 = ids_BT[0, 1:, None]
    nats_T, changed_T = (-log_p.gather(1, target_T1)[:, 0] for log_p in (before_TV, after_TV))
    kl_T = (before_TV.exp() * (before_TV - after_TV)).sum(1)
    rows = zip(
        target_T1[:, 0].tolist(),
        nats_T.tolist(),
        (changed_T - nats_T).tolist(),
        kl_T.clamp_min(0).tolist(),
        before_TV.argmax(1).tolist(),
        after_TV.argmax(1).tolist(),
        strict=True,
    )
    spell = tokenizer.decode
    return Table.of(
        Effect,
        (
            Effect(index, str(spell([token])), nats, change, kl, str(spell([a])), str(spell([b])))
            for index, (token, nats, change, kl, a, b) in enumerate(rows, 1)
        ),
    )


def _log_p_TV(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :-1]
    return nn.functional.log_softmax(logits_TV.float(), dim=-1)
