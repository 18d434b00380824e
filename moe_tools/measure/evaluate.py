"""Measures perplexity, FFN sparsity, FLOPs and bytes of a model on held-out blocks.

Letters: B blocks, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from moe_tools.data.generate import evaluating
from moe_tools.data.limits import check_text, continues_text
from moe_tools.data.progress import progress
from moe_tools.data.protocols import check_stride
from moe_tools.experts.prediction import Prediction
from moe_tools.hosts.inputs import model_inputs
from moe_tools.measure.flops import FlopCounter, Flops, count_flops
from moe_tools.measure.inputs import InputCount, count_inputs, spared
from moe_tools.measure.neurons import NeuronCount, count_neurons, sparsity, weight_bits, zeros
from moe_tools.measure.predictions import count_predictions
from moe_tools.measure.traffic import Traffic, traffic
from moe_tools.measure.two_levels import TwoLevels, moe_layers, two_levels
from moe_tools.names import IGNORE

ROWS = 256
"""Tokens whose logits are in fp32 at once."""
MASKED = 0.15
"""Share of an encoder's tokens that are masked and predicted (BERT, arXiv 1810.04805)."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model on one text."""

    perplexity: float
    """exp(nats_per_token); NaN, as that, for a regression."""
    nats_per_token: float
    """Mean negative log-likelihood of the predicted tokens."""
    tokens: int
    """Predicted tokens: all but the first of each block, or of overlapping windows all that no
    earlier one has predicted; of an encoder, the masked ones; of a
    classifier, one a text."""
    ffn_sparsity: float
    """Share of neurons off, over tokens and FFNs; 0 for a dense model."""
    layer_sparsity: dict[str, float]
    """FFN name -> share of its neurons off, over the tokens it saw; empty for a dense model."""
    flops: Flops
    """FLOPs per token of the text."""
    seconds: float
    traffic: dict[int, Traffic] = field(default_factory=dict)
    """Tokens of a pass (1, 4 and 16, where a batch of the text has so many) -> bytes it reads."""
    two_levels: TwoLevels | None = None
    """Both kinds of sparsity over all layers of an MoE host; None: the model is none."""
    moe_layers: dict[str, TwoLevels] = field(default_factory=dict)
    """Path of an MoE layer -> both kinds of its sparsity."""
    accuracy: float | None = None
    """Share of texts whose class is right; None: it is no classifier."""
    figures: dict[str, float] = field(default_factory=dict)
    """What else its task is judged by: a regression's "mse", "pearson" and "spearman", an
    encoder-decoder's "token accuracy" and "exact match"."""
    zeros: float | None = None
    """Share of exact zeros among the neurons that ran: all of a dense model's, of a routed one
    those that it turned on. None: its activation gives no zeros."""
    predictions: dict[str, Prediction] = field(default_factory=dict)
    """FFN name -> how its predictor did; empty without neuron predictors. An MoE host's expert that
    saw no token has counts of 0."""


def evaluate(
    model: PreTrainedModel,
    blocks_BT: Tensor,
    *,
    batch_size: int = 4,
    title: str = "",
    mask_token: int | None = None,
    seed: int = 0,
    after: int = 0,
    stride: int | None = None,
) -> Evaluation:
    """Evaluates a dense or routed model as it stands, in its own dtype and mode.

    A causal model predicts every token from those before it. An encoder (BERT) predicts 15 % of
    the tokens of every block, replaced by its mask token: a pseudo-perplexity, comparable between
    encoders of one tokenizer only. An encoder-decoder (T5) gets the same block on both sides,
    teacher-forced: a figure that shows whether a conversion kept the model's output, and no more.
    The model's parameters and mode stay as they are; the fused experts of a dense MoE host are
    taken apart, as `find_ffns` does.

    Args:
        model: what is evaluated.
        blocks_BT: token blocks, B x T.
        batch_size: blocks of one forward pass.
        title: of the progress bar.
        mask_token: the tokenizer's; only encoders need it.
        seed: which tokens of an encoder's blocks are masked.
        after: only what follows the first `after` tokens of every block is predicted; FLOPs and
            bytes are those of all tokens.
        stride: the blocks are windows of one text, and each starts so many tokens after the one
            before (`moe_tools.data.protocols`): of every window but the first, only the last
            `stride` tokens are predicted. Sparsity, FLOPs and bytes are those of all tokens.

    Raises:
        ValueError: blocks that the model cannot take, or without a token after so many; no mask
            token for an encoder, or no FFN of a known family; a stride that leaves tokens out, or
            a model that does not continue text with one.
        FloatingPointError: the loss is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    check_evaluable(model, blocks_BT, mask_token, after, stride)
    early_BT = _early(blocks_BT, after, stride)
    inputs_BT, labels_BT = _task(model, blocks_BT.cpu(), mask_token, seed, early_BT)
    nats = 0.0
    with (
        tally(model) as seen,
        evaluating(model),
        progress(title or "evaluate", len(blocks_BT), "block") as bar,
    ):
        pairs = zip(inputs_BT.split(batch_size), labels_BT.split(batch_size), strict=True)
        for batch_BT, batch_labels_BT in pairs:
            nats += _nats(model, batch_BT.to(model.device), batch_labels_BT.to(model.device))
            bar.update(len(batch_BT))
    predicted = int((labels_BT != IGNORE).sum())
    return seen.evaluation(nats, predicted, blocks_BT.numel(), blocks_BT.shape[1])


@dataclass
class Tally:
    """What is counted while a model runs."""

    model: PreTrainedModel
    counts: list[NeuronCount]
    predictions: dict[str, Prediction]
    others: FlopCounter
    inputs: list[InputCount]
    began: float = field(default_factory=time.perf_counter)

    def evaluation(
        self, nats: float, predicted: int, tokens: int, length: int, accuracy: float | None = None
    ) -> Evaluation:
        """The figures of a run.

        Args:
            nats: negative log-likelihood, summed over what was predicted.
            predicted: tokens; of a classifier, texts.
            tokens: that the model saw.
            length: of the block that a token is in.
            accuracy: of a classifier.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        mean = nats / predicted
        if not mean < 700:  # NaN too; exp(710) is no float any more
            name = type(self.model).__name__
            what = "token" if accuracy is None else "text"
            raise FloatingPointError(f"{name} has a loss of {mean} nats per {what}")
        made = Evaluation(
            perplexity=math.exp(mean),
            nats_per_token=mean,
            tokens=predicted,
            accuracy=accuracy,
            ffn_sparsity=sparsity(self.counts),
            two_levels=two_levels(self.counts),
            moe_layers=moe_layers(self.counts),
            zeros=zeros(self.counts),
            layer_sparsity={c.name: c.sparsity for c in self.counts if c.routed and c.tokens},
            flops=self.others.flops(self.model, self.counts, tokens, length),
            traffic=traffic(self.counts, self.others, weight_bits(self.model), self.inputs),
            seconds=time.perf_counter() - self.began,
            predictions=self.predictions,
        )
        return self._without_dropped(made, tokens) if self.inputs else made

    def _without_dropped(self, seen: Evaluation, tokens: int) -> Evaluation:
        """Takes what thresholds on inputs save from the FLOPs; of a dense model, it is off."""
        ffn, rest = spared(self.inputs, tokens)
        flops = replace(seen.flops, ffn=seen.flops.ffn - 2 * ffn, spared=2 * rest)
        routed = any(count.routed for count in self.counts)
        off = seen.ffn_sparsity if routed else 1 - flops.ffn / flops.ffn_dense
        return replace(seen, flops=flops, ffn_sparsity=off)


@contextmanager
def tally(model: PreTrainedModel) -> Iterator[Tally]:
    """Counts neurons, predictions and FLOPs while it lasts."""
    with (
        count_neurons(model) as counts,
        count_predictions(model) as predictions,
        count_flops(model) as others,
        count_inputs(model) as inputs,
    ):
        yield Tally(model, counts, predictions, others, inputs)


def check_evaluable(
    model: PreTrainedModel,
    blocks_BT: Tensor,
    mask_token: int | None,
    after: int = 0,
    stride: int | None = None,
) -> None:
    """Whether `evaluate` can measure a model, whose weights may be empty, on these blocks.

    Raises:
        ValueError: as `evaluate`.
    """
    if blocks_BT.ndim != 2 or blocks_BT.shape[0] < 1 or blocks_BT.shape[1] < 2:
        raise ValueError(
            f"blocks are {tuple(blocks_BT.shape)}; evaluation needs (blocks, tokens), at least "
            "one block of two tokens"
        )
    if not 0 <= after < blocks_BT.shape[1]:
        raise ValueError(
            f"after the first {after} tokens of a block of {blocks_BT.shape[1]} there is nothing "
            "to predict: --after is a number below the block length"
        )
    check_stride(blocks_BT.shape[1], stride, after)
    if stride is not None and not continues_text(model):
        raise ValueError(
            f"{type(model).__name__} does not continue text: only what does is measured on windows "
            "of one text, leave the stride out"
        )
    check_text(model, blocks_BT)
    if not _predicts(model):
        raise ValueError(
            f"{type(model).__name__} has no head that predicts tokens, and no perplexity: evaluate "
            "a causal or masked language model, or a classifier on labelled data; `convert` works "
            "with --eval-tokens 0"
        )
    if not model.can_generate() and mask_token is None:
        raise ValueError(
            f"{type(model).__name__} predicts masked tokens: evaluation needs the mask token of "
            "its tokenizer"
        )


def _predicts(model: PreTrainedModel) -> bool:
    """Whether a model has a head over its vocabulary."""
    masked = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return model.can_generate() or masked or model.get_output_embeddings() is not None


def _early(blocks_BT: Tensor, after: int, stride: int | None) -> Tensor:
    """Tokens that are given and not predicted: the first ones, and what a window before had."""
    blocks, length = blocks_BT.shape
    given_B1 = torch.full((blocks, 1), after)
    if stride is not None:
        given_B1[1:].clamp_(min=length - stride)
    return torch.arange(length) < given_B1


def _task(
    model: PreTrainedModel, blocks_BT: Tensor, mask_token: int | None, seed: int, early_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model sees, and what it has to say at each position (`IGNORE`: nothing)."""
    labels_BT = blocks_BT.masked_fill(early_BT, IGNORE)
    if model.can_generate():
        return blocks_BT, nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
    assert mask_token is not None
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(MASKED * blocks_BT.shape[1]))
    chosen_BK = torch.rand(blocks_BT.shape, generator=generator).topk(count, dim=1).indices
    mask_BT = torch.zeros_like(blocks_BT, dtype=torch.bool).scatter(1, chosen_BK, True)
    return blocks_BT.masked_fill(mask_BT, mask_token), labels_BT.masked_fill(~mask_BT, IGNORE)


@torch.no_grad()
def _nats(model: PreTrainedModel, inputs_BT: Tensor, labels_BT: Tensor) -> float:
    """Negative log-likelihood of the labelled tokens, summed; fp32 for `ROWS` tokens at a time."""
    options = {"use_cache": False} if model.can_generate() else {}
    logits_TV = model(**model_inputs(model, inputs_BT), **options).logits.flatten(0, 1)
    total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
    rows = zip(logits_TV.split(ROWS), labels_BT.flatten().split(ROWS), strict=True)
    for logits, labels in rows:
        total += nn.functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE, reduction="sum"
        )
    return total.item()
