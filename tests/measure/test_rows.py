"""Conversations, measured one by one on what the assistant says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_tools.data import Batches, rows
from moe_tools.measure.rows import evaluate_rows
from moe_tools.names import IGNORE
from tests.data.test_chat import CHAT, write_chat
from tests.families import THRESHOLD, build, routed


@pytest.mark.parametrize("converted", [False, True])
def test_the_perplexity_is_that_of_each_alone(tmp_path: Path, converted: bool) -> None:
    torch.manual_seed(0)
    model = build("llama", vocab_size=80).eval()
    if converted:
        model, _ = routed(model, THRESHOLD)
    source = write_chat(tmp_path / "chat.jsonl", 40)
    text = rows(source, CHAT, split="train", length=64, tokens=None, packing="padded")
    nats, said = 0.0, 0
    for at in range(len(text)):
        row = text.row(at)
        assert row.learned_T is not None
        ids, learned = torch.from_numpy(row.ids_T)[None], torch.from_numpy(row.learned_T)[None]
        labels = ids.masked_fill(~learned, IGNORE)[0, 1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        said += int((labels != IGNORE).sum())
    found = [evaluate_rows(model, Batches(text, "padded", size)) for size in (1, 8)]
    for seen in found:
        assert seen.tokens == said
        assert seen.perplexity == pytest.approx(math.exp(nats / said), rel=1e-4)
    assert found[0].ffn_sparsity == pytest.approx(found[1].ffn_sparsity, abs=1e-3)


def test_what_continues_no_text_is_refused(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", 40)
    text = rows(source, CHAT, split="train", length=16, tokens=None, packing="padded")
    with pytest.raises(ValueError, match="packing: padded is of causal language models"):
        evaluate_rows(build("bert"), Batches(text, "padded", 4))
