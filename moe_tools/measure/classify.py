"""Measures accuracy, FFN sparsity and FLOPs of a classifier. Letters: B rows, T tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tools.data import Batch, token_count
from moe_tools.data.generate import evaluating
from moe_tools.data.limits import check_text
from moe_tools.data.progress import progress
from moe_tools.hosts.inputs import model_inputs
from moe_tools.measure.evaluate import Evaluation, tally


@torch.no_grad()
def evaluate_classifier(
    model: PreTrainedModel, batches: Sequence[Batch], *, title: str = ""
) -> Evaluation:
    """Evaluates a dense or routed classifier as it stands, in its own dtype and mode.

    Args:
        model: tells the classes of `labels_B` apart.
        batches: labelled rows.
        title: of the progress bar.

    Raises:
        ValueError: no batch, one without labels, or one that the model cannot take.
        FloatingPointError: the loss is not finite.
    """
    if not batches or any(batch.labels_B is None for batch in batches):
        raise ValueError("a classifier is evaluated on labelled batches, and there are none")
    check_text(model, batches)
    nats, hits, rows = 0.0, 0, 0
    with (
        tally(model) as seen,
        evaluating(model),
        progress(title or "evaluate", len(batches), "batch") as bar,
    ):
        for batch in batches:
            labels_B = batch.labels_B
            assert labels_B is not None
            here = batch.to(model.device)
            logits = model(**model_inputs(model, here)).logits.float().cpu()
            nats += nn.functional.cross_entropy(logits, labels_B, reduction="sum").item()
            hits += int((logits.argmax(-1) == labels_B).sum())
            rows += len(labels_B)
            bar.update()
    tokens, length = token_count(batches), context(batches)
    return seen.evaluation(nats, rows, tokens, length, accuracy=hits / rows)


def context(batches: Sequence[Batch]) -> int:
    """Length of the row that the average token is in, rounded."""
    squares = sum(batch.ids_BT.numel() * batch.ids_BT.shape[1] for batch in batches)
    return round(squares / token_count(batches))
