"""FLOPs against numbers written out, and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from moe_tools.experts.experts import expert_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.flops import Flops, attention_flops, causal_context, forward_flops
from tests.families import FAMILIES, build, routed

T = 8
BLOCKS = torch.randint(5, 64, (3, T), generator=torch.Generator().manual_seed(7))
MASK = 4

# Tiny llama: width 16, 48 neurons, 2 layers, 2 heads of 8, 64 tokens in the vocabulary.
FFN = 3 * 2 * 16 * 48  # gate, up and down of one layer: 4608
ROUTER = 2 * 16 * 6  # six experts: 192
PROJECTIONS = 4 * 2 * 16 * 16  # q, k, v and o: 2048
SCORES = 2 * 2 * 16 * 4.5  # q k^T and times v; mean context of 8 causal tokens: 288
HEAD = 2 * 16 * 64  # 2048
REST = 2 * (PROJECTIONS + SCORES) + HEAD


def test_a_dense_llama_by_hand() -> None:
    flops = evaluate(build("llama"), BLOCKS).flops
    assert (FFN, SCORES, REST) == (4608, 288, 6720)
    assert flops == Flops(ffn_dense=9216, ffn=9216, router=0, attention_and_rest=6720)
    assert (flops.total, flops.total_dense) == (15936, 15936)


@torch.no_grad()
def test_a_routed_llama_by_hand() -> None:
    model, ffns = routed(build("llama"))
    for ffn, bits in zip(ffns, ([1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]), strict=True):
        ffn.router.bias.copy_(200.0 * torch.tensor(bits) - 100.0)
    flops = evaluate(model, BLOCKS, batch_size=2).flops
    assert flops.ffn_dense == 9216
    assert flops.ffn == pytest.approx(4608 * 4 / 6 + 4608 * 3 / 6)  # 5376
    assert flops.router == 2 * ROUTER == 384
    assert flops.attention_and_rest == REST
    assert flops.total == pytest.approx(5376 + 384 + 6720)
    assert flops.total_dense == 15936


@pytest.mark.parametrize("converted", [False, True])
def test_a_mixtral_is_charged_for_the_two_experts_a_token_visits(converted: bool) -> None:
    model = build("mixtral")
    if converted:
        model, _ = routed(model)
    flops = evaluate(model, BLOCKS).flops
    projections = 2 * 16 * (16 + 8 + 8 + 16)  # one head of 8 for keys and values: 1536
    host_router = 2 * 16 * 4
    assert flops.ffn == flops.ffn_dense == 2 * 2 * FFN  # 18432: two layers, two of four experts
    assert flops.router == (2 * 2 * ROUTER if converted else 0)
    assert flops.attention_and_rest == 2 * (projections + host_router + SCORES) + HEAD  # 5952


def full_attention(model: PreTrainedModel) -> float:
    """What a program without causal skipping spends on attention, per token."""
    attentions = 3 * 2 if model.config.is_encoder_decoder else 2  # decoder layers have two
    return 4 * 16 * T * attentions


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_torch_counts_the_same(family: str) -> None:
    model = build(family, attn_implementation="eager")
    flops = evaluate(model, BLOCKS, mask_token=MASK).flops
    inputs = {"input_ids": BLOCKS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = BLOCKS
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    expected = counter.get_total_flops() / BLOCKS.numel()
    ours = flops.total_dense - attention_flops(model, T) + full_attention(model)
    # Rotary embeddings come from a small matrix product that we do not count: 8 FLOPs and less.
    assert ours <= expected
    assert ours == pytest.approx(expected, abs=20)


def test_an_encoder_attends_to_everything() -> None:
    assert attention_flops(build("bert"), T) == 2 * 4 * 16 * T


def test_an_encoder_decoder_attends_three_ways() -> None:
    assert attention_flops(build("t5-relu"), T) == 2 * 4 * 16 * (T + (T + 1) / 2 + T)


@pytest.mark.parametrize(
    ("length", "window", "expected"),
    [(8, None, 36 / 8), (4, 2, (1 + 2 + 2 + 2) / 4), (4, 4, 10 / 4), (4, 9, 10 / 4), (1, None, 1)],
)
def test_causal_context(length: int, window: int | None, expected: float) -> None:
    assert causal_context(length, window) == expected


def test_a_sliding_window_is_seen() -> None:
    both = build("gemma2", sliding_window=2)  # one layer slides, one does not
    assert attention_flops(both, 4) == 4 * 16 * (7 / 4 + 10 / 4)
    assert attention_flops(build("mistral", sliding_window=2), 4) == 4 * 16 * 2 * 7 / 4


def test_nothing_is_on_and_the_router_still_costs() -> None:
    model, _ = routed(build("llama"))
    with torch.no_grad():
        for ffn in expert_ffns(model):
            ffn.router.bias.fill_(-100.0)
    flops = evaluate(model, BLOCKS).flops
    assert (flops.ffn, flops.router, flops.total) == (0, 384, 384 + 6720)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_shapes_alone_say_what_a_forward_pass_costs(family: str, sparse: bool) -> None:
    model = routed(build(family))[0] if sparse else build(family)
    seen = evaluate(model, BLOCKS, mask_token=MASK)
    expected = seen.flops.total_dense + seen.flops.router
    assert forward_flops(model, T) == pytest.approx(expected, rel=1e-12)
    assert forward_flops(model.to("meta"), T) == pytest.approx(expected, rel=1e-12)
