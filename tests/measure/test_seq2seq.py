"""What an encoder-decoder says: padding has no effect, and figures are those of single rows."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moe_tools.data import Batch
from moe_tools.data.seq2seq import unpadded
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.measure.seq2seq import evaluate_seq2seq, exact_match
from moe_tools.names import IGNORE
from tests.families import build
from tests.tiny import build_tokenizer

EOS = 1
TOKENIZER = build_tokenizer()


def t5(routed: bool = True) -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = T5Config(**sizes, **tokens, eos_token_id=EOS, feed_forward_proj="relu")
    model = T5ForConditionalGeneration(config).eval()
    if routed:
        attach_experts(model, Conversion("donor", 8, "sigmoid", {"kind": "threshold", "tau": 0.5}))
    return model


def bart() -> PreTrainedModel:
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": EOS}
    start = {"decoder_start_token_id": EOS, "forced_eos_token_id": EOS}
    config = BartConfig(vocab_size=64, init_std=0.5, **sizes, **heads, **widths, **tokens, **start)
    return BartForConditionalGeneration(config).eval()


def padded() -> list[Batch]:
    """Two batches of three rows of other lengths, on both sides."""
    found = []
    for lengths, said in (((3, 7, 5), (4, 1, 6)), ((6, 6, 2), (2, 3, 3))):
        ids_BT = torch.randint(3, 64, (3, max(lengths)))
        mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        targets_BS = torch.randint(3, 64, (3, max(said)))
        ends = torch.arange(max(said)) < torch.tensor(said)[:, None]
        targets_BS = targets_BS.masked_fill(~ends, IGNORE)
        found.append(Batch(ids_BT * mask_BT, mask_BT=mask_BT, targets_BS=targets_BS))
    return found


def by_hand(model: PreTrainedModel, batches: list[Batch]) -> tuple[float, float]:
    """Nats and hits per token: the model's own loss on every row alone."""
    nats = hits = count = 0.0
    for batch in unpadded(batches):
        for ids_T, targets_S in zip(batch.ids_BT, batch.next_labels_BT(), strict=True):
            with torch.no_grad():
                found = model(input_ids=ids_T[None], labels=targets_S[None])
            nats += float(found.loss) * len(targets_S)
            hits += int((found.logits[0].argmax(-1) == targets_S).sum())
            count += len(targets_S)
    return nats / count, hits / count


@pytest.mark.parametrize("model", [t5(), t5(routed=False), bart()], ids=["routed", "t5", "bart"])
def test_padding_has_no_effect(model: PreTrainedModel) -> None:
    batches = padded()
    found, plain = (evaluate_seq2seq(model, each) for each in (batches, [*unpadded(batches)]))
    nats, hits = by_hand(model, batches)
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert found.figures == {"token accuracy": pytest.approx(hits)}
    assert found.tokens == plain.tokens == 19
    assert plain.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert found.ffn_sparsity == pytest.approx(plain.ffn_sparsity)
    assert asdict(found.flops) == pytest.approx(asdict(plain.flops))


def test_flops_are_those_of_each_side() -> None:
    """Of T5, the products of attention: 4 x width x context, for every token and layer."""
    model = t5(routed=False)
    batch = Batch(torch.randint(3, 64, (1, 6)), targets_BS=torch.randint(3, 64, (1, 4)))
    whole = evaluate_seq2seq(model, [batch]).flops
    encoder = 4 * 16 * 2 * 6 * 6
    decoder = 4 * 16 * 2 * 4 * ((4 + 1) / 2 + 6)
    d, inner = 16, 16
    linears = {
        "encoder": 2 * 4 * d * inner * 6,
        "decoder": 2 * (4 * d * inner * 4 + 2 * d * inner * 4 + 2 * d * inner * 6),
        "head": d * 64 * 4,
    }
    expected = 2 * sum(linears.values()) + encoder + decoder
    assert whole.attention_and_rest == pytest.approx(expected / 10)


def test_exact_match_is_of_what_is_generated() -> None:
    """Targets that the model says itself are matched, each other one is not."""
    model = bart()
    ids_BT = torch.randint(3, 64, (4, 5))
    said = model.generate(input_ids=ids_BT, max_new_tokens=6, do_sample=False, num_beams=1)
    targets_BS = said[:, 1:].masked_fill(said[:, 1:] == 0, IGNORE)
    right = [Batch(ids_BT, targets_BS=targets_BS)]
    assert exact_match(model, right, TOKENIZER) == 1.0
    wrong_BS = targets_BS.clone()
    wrong_BS[:2, 0] = (wrong_BS[:2, 0] - 3 + 1) % 60 + 3
    assert exact_match(model, [Batch(ids_BT, targets_BS=wrong_BS)], TOKENIZER) == 0.5
    assert exact_match(model, [Batch(ids_BT, targets_BS=wrong_BS)], TOKENIZER, generated=2) == 0.5
    found = evaluate_seq2seq(model, right, tokenizer=TOKENIZER)
    assert found.figures["exact match"] == 1.0


def test_what_says_no_targets() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is no encoder-decoder, and says no tar"):
        evaluate_seq2seq(build("llama"), padded())
    for wrong in ([], [Batch(torch.ones(1, 3, dtype=torch.long))]):
        with pytest.raises(ValueError, match="evaluated on targets, and there are none"):
            evaluate_seq2seq(t5(), wrong)
