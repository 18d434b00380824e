"""Measures how well a model's scores agree with the true ones. Letters: B texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.data import Batch, token_count
from moe_tools.data.generate import evaluating
from moe_tools.data.limits import check_text
from moe_tools.data.progress import progress
from moe_tools.hosts.inputs import model_inputs
from moe_tools.measure.classify import context
from moe_tools.measure.evaluate import Evaluation, tally


@torch.no_grad()
def evaluate_regressor(
    model: PreTrainedModel, batches: Sequence[Batch], *, title: str = ""
) -> Evaluation:
    """Evaluates a dense or routed model of one score as it stands, in its own dtype and mode.

    Returns:
        With the figures "mse", the mean squared error, and the correlations "pearson" and
        "spearman", which are left out where all scores are the same. Perplexity is NaN.

    Raises:
        ValueError: no batch, one without scores, one that the model cannot take, or a model that
            gives more than one score.
        FloatingPointError: a score is not finite.
    """
    if not batches or any(
        b.labels_B is None or not b.labels_B.is_floating_point() for b in batches
    ):
        raise ValueError("a regression is evaluated on texts with scores, and there are none")
    if model.config.num_labels != 1:
        raise ValueError(
            f"{type(model).__name__} tells {model.config.num_labels} classes apart, and gives no "
            "score: evaluate it on labels (task: classify)"
        )
    check_text(model, batches)
    said: list[Tensor] = []
    with (
        tally(model) as seen,
        evaluating(model),
        progress(title or "evaluate", len(batches), "batch") as bar,
    ):
        for batch in batches:
            logits_B1 = model(**model_inputs(model, batch.to(model.device))).logits
            said.append(logits_B1.double().cpu().squeeze(-1))
            bar.update()
    scores_B = torch.cat(said)
    labels_B = torch.cat([batch.labels_B for batch in batches if batch.labels_B is not None])
    if not scores_B.isfinite().all():
        raise FloatingPointError(f"{type(model).__name__} gives a score that is not finite")
    found = seen.evaluation(0.0, len(labels_B), token_count(batches), context(batches))
    none = math.nan
    figures = agreement(scores_B, labels_B.double())
    return replace(found, perplexity=none, nats_per_token=none, figures=figures)


def agreement(scores_B: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Mean squared error, Pearson's correlation and Spearman's: Pearson's of the ranks.

    A correlation that is 0 over 0, as all scores are the same, is left out.
    """
    found = {"mse": float((scores_B - labels_B).square().mean())}
    pairs = {
        "pearson": (scores_B, labels_B),
        "spearman": (ranks(scores_B), ranks(labels_B)),
    }
    for name, (ours_B, theirs_B) in pairs.items():
        value = _correlation(ours_B.double(), theirs_B.double())
        if value is not None:
            found[name] = value
    return found


def ranks(values_B: Tensor) -> Tensor:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, which_B, counts = values_B.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[which_B]


def _correlation(ours_B: Tensor, theirs_B: Tensor) -> float | None:
    if len(ours_B.unique()) < 2 or len(theirs_B.unique()) < 2:
        return None
    return float(torch.corrcoef(torch.stack([ours_B, theirs_B]))[0, 1])
