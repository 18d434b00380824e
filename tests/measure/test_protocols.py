"""Perplexity on windows of one text, against the loops of the papers' scripts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_tools.data.protocols import protocol_text, protocol_windows
from moe_tools.measure.evaluate import evaluate
from tests.data.test_protocols import starting
from tests.families import build, randomize, routed
from tests.tiny import build_tokenizer, write_passages

LENGTH = 16
TOKENIZERS = {"without BOS": build_tokenizer, "with BOS": starting}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture
def source(tmp_path: Path) -> str:
    write_passages(tmp_path / "text.txt", 12)
    return str(tmp_path / "text.txt")


@pytest.fixture
def model() -> PreTrainedModel:
    made, _ = routed(build("llama"))
    randomize(made)
    return made


def joined(source: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """ids_1T of the whole text, as the scripts take it."""
    return tokenizer(protocol_text("wikitext2", source), return_tensors="pt").input_ids


def mean_nats(model: PreTrainedModel, ids_1T: Tensor, labels_1T: Tensor) -> float:
    """What `outputs.loss` of transformers is, in fp64."""
    logits_TV = model(input_ids=ids_1T).logits[0, :-1].double()
    return nn.functional.cross_entropy(logits_TV, labels_1T[0, 1:]).item()


@torch.no_grad()
def test_the_figure_is_that_of_the_scripts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    """GPTQ's `llama_eval`, Wanda's `eval_ppl_wikitext`, CMoE's `cmoe_ppl_eval`.

    They multiply the mean of T - 1 tokens by T, and divide by all T in the end: of windows of one
    length that is the mean over what was predicted.
    """
    ids_1T = joined(source, tokenizer)
    count = ids_1T.numel() // LENGTH
    cuts = [ids_1T[:, at * LENGTH : (at + 1) * LENGTH] for at in range(count)]
    nlls = [mean_nats(model, cut, cut) * LENGTH for cut in cuts]
    expected = math.exp(sum(nlls) / (count * LENGTH))
    windows = protocol_windows("wikitext2", tokenizer, length=LENGTH, source=source)
    seen = evaluate(model, windows)
    assert len(cuts) > 10 and seen.tokens == count * (LENGTH - 1)
    assert seen.perplexity == pytest.approx(expected, rel=1e-5)


def sliding(
    model: PreTrainedModel, ids_1T: Tensor, stride: int, *, exact: bool
) -> tuple[float, int]:
    """The loop of transformers' page on perplexity; `exact` weighs a mean by what it is a mean of.

    https://huggingface.co/docs/transformers/perplexity; windows that the end cuts are left out.
    """
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, ids_1T.shape[1] - LENGTH + 1, stride):
        end_loc = begin_loc + LENGTH
        trg_len = end_loc - prev_end_loc
        input_ids = ids_1T[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        count = int((target_ids[:, 1:] != -100).sum())
        if not exact:
            count = int((target_ids != -100).sum()) - 1
        nll_sum += mean_nats(model, input_ids, target_ids) * count
        n_tokens += count
        prev_end_loc = end_loc
    return math.exp(nll_sum / n_tokens), n_tokens


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
@torch.no_grad()
def test_a_stride_counts_the_last_tokens_of_each_window(
    stride: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    ids_1T = joined(source, tokenizer)
    windows = protocol_windows("wikitext2", tokenizer, length=LENGTH, stride=stride, source=source)
    seen = evaluate(model, windows, stride=stride)
    expected, tokens = sliding(model, ids_1T, stride, exact=True)
    assert seen.tokens == tokens
    assert seen.perplexity == pytest.approx(expected, rel=1e-5)
    if stride == 8:  # the page weighs every window but the first by one token too few
        assert seen.perplexity == pytest.approx(sliding(model, ids_1T, 8, exact=False)[0], rel=1e-2)


def test_every_token_but_the_first_is_predicted_once(model: PreTrainedModel, source: str) -> None:
    windows = protocol_windows("ptb", build_tokenizer(), length=8, stride=4, source=source)
    assert evaluate(model, windows, stride=4).tokens == 8 + 4 * (len(windows) - 1) - 1
    # no overlap: as without a stride, the first token of a window has nothing before it
    apart = protocol_windows("ptb", build_tokenizer(), length=8, source=source)
    assert evaluate(model, apart, stride=8).nats_per_token == evaluate(model, apart).nats_per_token


@torch.no_grad()
def test_teal_counts_the_last_tokens_of_the_first_window_too(
    model: PreTrainedModel, source: str
) -> None:
    """FasterDecoding/TEAL, utils/eval_ppl.py: a mean of means over the last `stride` tokens."""
    ids_1T = joined(source, build_tokenizer())
    nlls = []
    for begin in range(0, ids_1T.shape[1] - LENGTH + 1, 4):
        input_ids = ids_1T[:, begin : begin + LENGTH]
        target_ids = input_ids.clone()
        target_ids[:, :-4] = -100
        nlls.append(mean_nats(model, input_ids, target_ids))
    windows = protocol_windows(
        "wikitext2", build_tokenizer(), length=LENGTH, stride=4, source=source
    )
    seen = evaluate(model, windows, stride=4, after=LENGTH - 4)
    assert seen.tokens == 4 * len(nlls)
    assert seen.nats_per_token == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


def test_figures_are_those_of_all_tokens_of_the_windows(
    model: PreTrainedModel, source: str
) -> None:
    windows = protocol_windows("ptb", build_tokenizer(), length=8, stride=4, source=source)
    strided, plain = evaluate(model, windows, stride=4), evaluate(model, windows)
    assert strided.layer_sparsity == plain.layer_sparsity and strided.flops == plain.flops
    assert strided.traffic == plain.traffic and strided.tokens < plain.tokens


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"stride": 0}, "a stride of 0 leaves tokens out between windows of 8"),
        ("llama", {"stride": 9}, "--stride is a number from 1 to 8"),
        ("llama", {"stride": 5, "after": 4}, "--stride is at most 4, or --after at most 3"),
        ("bert", {"stride": 4, "mask_token": 2}, "BertForMaskedLM does not continue text"),
        ("t5-gated", {"stride": 4}, "T5ForConditionalGeneration does not continue text"),
    ],
)
def test_strides_that_are_refused(family: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(build(family), torch.full((2, 8), 5), **options)
