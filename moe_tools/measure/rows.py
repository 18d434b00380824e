"""Measures perplexity, FFN sparsity and FLOPs on texts of their own length, such as conversations.

Letters: B rows, T tokens of a row.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tools.data import Batches
from moe_tools.data.batch import Batch
from moe_tools.data.generate import evaluating
from moe_tools.data.limits import check_text
from moe_tools.data.progress import progress
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.isolation import check_packing
from moe_tools.measure.evaluate import Evaluation, tally
from moe_tools.names import IGNORE


@torch.no_grad()
def evaluate_rows(model: PreTrainedModel, batches: Batches, *, title: str = "") -> Evaluation:
    """Evaluates a causal language model as it stands on texts, each of which sees only itself.

    Perplexity is that of the tokens that are learned in training: of a conversation, what the
    assistant says. Sparsity, FLOPs and bytes are those of all tokens but padding.

    Args:
        model: dense or routed, in its own dtype and mode.
        batches: padded ones.
        title: of the progress bar.

    Raises:
        ValueError: a model that cannot take them.
        FloatingPointError: the loss is not finite.
    """
    check_rows(model, batches)
    nats, predicted = 0.0, 0
    with (
        tally(model) as seen,
        evaluating(model),
        progress(title or "evaluate", len(batches), "batch") as bar,
    ):
        for batch in batches:
            own, count = _nats(model, batch)
            nats += own
            predicted += count
            bar.update()
    tokens = batches.tokens
    squares = sum(batches.rows.size(index) ** 2 for index in range(len(batches.rows)))
    return seen.evaluation(nats, predicted, tokens, round(squares / tokens))


def check_rows(model: PreTrainedModel, batches: Batches) -> None:
    """Whether a model, whose weights may be empty, can be evaluated on such texts.

    Raises:
        ValueError: it continues no text, takes no mask, or not texts of this length or tokens.
    """
    check_packing(model, "padded")
    check_text(model, batches)


def _nats(model: PreTrainedModel, batch: Batch) -> tuple[float, int]:
    """Negative log-likelihood of the learned tokens, summed, and how many there are."""
    moved = batch.to(model.device)
    logits_TV = model(**model_inputs(model, moved), use_cache=False).logits.flatten(0, 1)
    labels_T = moved.next_labels_BT().flatten()
    kept_T = labels_T != IGNORE
    said_TV, labels_T = logits_TV[kept_T].float(), labels_T[kept_T]
    return nn.functional.cross_entropy(said_TV, labels_T, reduction="sum").item(), len(labels_T)
