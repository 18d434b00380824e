"""Correlations as scipy has them, and the figures of a model that gives scores."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from moe_tools.data import Batch
from moe_tools.measure.regression import agreement, evaluate_regressor, ranks

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
BERT = {"vocab_size": 64, "num_attention_heads": 2, "initializer_range": 0.5, **SIZES}


def build(labels: int = 1) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=labels)).eval()


def texts() -> list[Batch]:
    return [Batch(torch.randint(64, (5, length)), torch.rand(5) * 5) for length in (3, 7, 4)]


@pytest.mark.parametrize("values", [1000, 4], ids=["distinct", "many equal"])
def test_correlations_are_those_of_scipy(values: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = (torch.randint(values, (60,)).double() for _ in range(2))
    theirs += ours
    found = agreement(ours, theirs)
    assert found["pearson"] == pytest.approx(stats.pearsonr(ours, theirs).statistic, abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(ours, theirs).statistic, abs=1e-12)
    assert found["mse"] == pytest.approx(float((ours - theirs).square().mean()))


def test_correlations_by_hand() -> None:
    """Means 2 and 3; deviations (-1, 0, 1) and (-2, -1, 3): 5 / sqrt(2 * 14)."""
    found = agreement(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 6.0]))
    assert found["pearson"] == pytest.approx(5 / math.sqrt(28))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mse"] == pytest.approx(3.0)
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_scores_that_are_all_the_same_have_no_correlation() -> None:
    assert agreement(torch.ones(4), torch.arange(4.0)) == {"mse": pytest.approx(1.5)}


def test_a_model_is_measured_on_its_scores() -> None:
    model, batches = build(), texts()
    found = evaluate_regressor(model, batches)
    with torch.no_grad():
        scores = torch.cat([model(input_ids=batch.ids_BT).logits[:, 0] for batch in batches])
    labels = torch.cat([batch.labels_B for batch in batches if batch.labels_B is not None])
    assert found.figures["mse"] == pytest.approx(float((scores - labels).square().mean()), rel=1e-5)
    assert found.figures["pearson"] == pytest.approx(
        float(torch.corrcoef(torch.stack([scores, labels]))[0, 1]), rel=1e-4
    )
    assert math.isnan(found.perplexity) and math.isnan(found.nats_per_token)
    assert found.tokens == 15 and found.accuracy is None and found.flops.total > 0


def test_what_is_no_regression() -> None:
    batches = texts()
    with pytest.raises(ValueError, match="tells 3 classes apart, and gives no score"):
        evaluate_regressor(build(3), batches)
    classes = [batch._replace(labels_B=torch.ones(5, dtype=torch.long)) for batch in batches]
    for wrong in (classes, [], [batches[0]._replace(labels_B=None)]):
        with pytest.raises(ValueError, match="on texts with scores, and there are none"):
            evaluate_regressor(build(), wrong)
    broken = build()
    torch.nn.init.constant_(broken.classifier.bias, math.nan)
    with pytest.raises(FloatingPointError, match="gives a score that is not finite"):
        evaluate_regressor(broken, batches)
