"""Measures what an encoder-decoder says about held-out sources.

Letters: B rows, T tokens of a source, S tokens of a target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.data import Batch, token_count
from moe_tools.data.generate import evaluating
from moe_tools.data.limits import check_text, says_targets
from moe_tools.data.progress import progress
from moe_tools.hosts.inputs import model_inputs
from moe_tools.measure.evaluate import Evaluation, tally
from moe_tools.measure.flops import attention_flops, causal_context, decoder_layers
from moe_tools.names import IGNORE

GENERATED = 64
"""Rows that are generated for the exact matches: a token takes a pass of its own."""


@torch.no_grad()
def evaluate_seq2seq(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generated: int = GENERATED,
    title: str = "",
) -> Evaluation:
    """Evaluates a dense or routed encoder-decoder as it stands, in its own dtype and mode.

    Perplexity and nats are those of the target's tokens, each predicted from the source and the
    target's tokens before it. FLOPs and bytes are per token of sources and targets together.

    Args:
        model: an encoder-decoder.
        batches: with targets.
        tokenizer: decodes what is generated, for the figure "exact match".
        generated: rows, drawn evenly over all, that are generated greedily; 0: none.
        title: of the progress bar.

    Returns:
        With the figures "token accuracy", the share of the target's tokens that are the most likely
        ones, and with a tokenizer "exact match", the share of the generated rows whose text equals
        the target's, spaces at both ends left out.

    Raises:
        ValueError: no batch, one without targets, one that the model cannot take, or a model that
            is no encoder-decoder.
        FloatingPointError: the loss is not finite.
    """
    if not batches or any(batch.targets_BS is None for batch in batches):
        raise ValueError("an encoder-decoder is evaluated on targets, and there are none")
    if not says_targets(model):
        raise ValueError(
            f"{type(model).__name__} is no encoder-decoder, and says no targets: evaluate it "
            "without --task"
        )
    check_text(model, batches)
    nats, hits, said = 0.0, 0, 0
    with (
        tally(model) as seen,
        evaluating(model),
        progress(title or "evaluate", len(batches), "batch") as bar,
    ):
        for batch in batches:
            here = batch.to(model.device)
            targets_BS = here.next_labels_BT()
            logits_BSV = model(**model_inputs(model, here), use_cache=False).logits
            for logits_SV, targets_S in zip(logits_BSV, targets_BS, strict=True):
                kept_S = targets_S != IGNORE
                logits_SV, targets_S = logits_SV[kept_S].float(), targets_S[kept_S]
                loss = nn.functional.cross_entropy(logits_SV, targets_S, reduction="sum")
                nats += loss.item()
                hits += int((logits_SV.argmax(-1) == targets_S).sum())
                said += len(targets_S)
            bar.update()
    found = seen.evaluation(nats, said, token_count(batches), 1)
    attended = _attention(model, batches) / token_count(batches) - attention_flops(model, 1)
    flops = replace(found.flops, attention_and_rest=found.flops.attention_and_rest + attended)
    figures = {"token accuracy": hits / said}
    if tokenizer is not None and generated:
        figures["exact match"] = exact_match(model, batches, tokenizer, generated)
    return replace(found, flops=flops, figures=figures)


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase,
    generated: int = GENERATED,
) -> float:
    """Share of rows whose greedily generated text is the target's.

    A row is generated until EOS, and no longer than the longest target that stands in its batch.
    """
    rows = sum(len(batch.ids_BT) for batch in batches)
    every = max(1, -(-rows // generated))
    hits = seen = 0
    with evaluating(model), progress("generate", -(-rows // every), "row") as bar:
        first = 0
        for batch in batches:
            chosen = list(range(-first % every, len(batch.ids_BT), every))
            first += len(batch.ids_BT)
            if not chosen:
                continue
            part = batch.rows(chosen)
            ours, theirs = _said(model, part, tokenizer), part.next_labels_BT()
            wanted = [_text(tokenizer, target_S[target_S != IGNORE]) for target_S in theirs]
            hits += sum(one == other for one, other in zip(ours, wanted, strict=True))
            seen += len(chosen)
            bar.update(len(chosen))
    return hits / seen


def _said(model: PreTrainedModel, batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    targets_BS = batch.next_labels_BT()
    here = batch._replace(targets_BS=None, labels_B=None).to(model.device)
    mask_BT = torch.ones_like(here.ids_BT) if here.mask_BT is None else here.mask_BT.long()
    ids_BS = model.generate(  # type: ignore[operator]
        input_ids=here.ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=targets_BS.shape[1],
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return [_text(tokenizer, ids_S) for ids_S in ids_BS]


def _text(tokenizer: PreTrainedTokenizerBase, ids_S: Tensor) -> str:
    """The text up to EOS; behind it stands what fills the row."""
    ends = (ids_S == tokenizer.eos_token_id).nonzero()
    starts_with_eos = len(ends) and int(ends[0]) == 0  # BART's decoder begins with it
    first = ends[1:] if starts_with_eos else ends
    said = ids_S[: int(first[0])] if len(first) else ids_S
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def _attention(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """FLOPs of q k^T and its product with v over all rows, see `attention_flops`."""
    config = model.config
    decoders = decoder_layers(config)
    contexts = 0.0
    for batch in batches:
        targets_BS = batch.next_labels_BT()
        whole = torch.full((len(batch.ids_BT),), batch.ids_BT.shape[1])
        sources = whole if batch.mask_BT is None else batch.mask_BT.sum(1)
        said = (targets_BS != IGNORE).sum(1)
        for length, count in zip(sources.tolist(), said.tolist(), strict=True):
            contexts += config.num_hidden_layers * length * length
            contexts += decoders * count * (causal_context(count) + length)
    one = attention_flops(model, 1)
    layers = config.num_hidden_layers + 2 * decoders
    return one / layers * contexts
