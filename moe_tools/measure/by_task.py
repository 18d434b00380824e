"""Evaluates a model on batches as its task has it. Letters: B rows, T tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.data import Batch, Task
from moe_tools.measure.classify import evaluate_classifier
from moe_tools.measure.evaluate import Evaluation
from moe_tools.measure.regression import evaluate_regressor
from moe_tools.measure.seq2seq import GENERATED, evaluate_seq2seq


def evaluate_task(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    task: Task,
    *,
    tokenizer: PreTrainedTokenizerBase,
    generated: int = GENERATED,
    title: str = "",
) -> Evaluation:
    """Measures accuracy, correlations or targets: of every task but `lm`, which has blocks.

    `generated` rows say how often an encoder-decoder says the whole target.

    Raises:
        ValueError: as the function of the task.
        FloatingPointError: the loss is not finite.
    """
    if task == "seq2seq":
        return evaluate_seq2seq(
            model, batches, tokenizer=tokenizer, generated=generated, title=title
        )
    if task == "regress":
        return evaluate_regressor(model, batches, title=title)
    return evaluate_classifier(model, batches, title=title)
