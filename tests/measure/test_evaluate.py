"""Perplexity and sparsity against sums by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from moe_tools.experts.conversion import set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.evaluate import evaluate
from tests.families import (
    EXPERTS,
    FAMILIES,
    THRESHOLD,
    UNEVEN,
    build,
    every_size,
    of_size,
    per_neuron,
    randomize,
    routed,
)

MASK = 4
"""A token that no text of these tests has."""
ENCODERS = ("bert", "roberta")
every_family = pytest.mark.parametrize("family", FAMILIES)


def text(blocks: int = 3, length: int = 8) -> Tensor:
    """blocks_BT without special tokens."""
    return torch.randint(5, 64, (blocks, length), generator=torch.Generator().manual_seed(7))


def by_hand(logits_BTV: Tensor, targets_BT: Tensor) -> float:
    """The mean nats of next-token prediction, in one piece and in fp64."""
    logits_TV = logits_BTV[:, :-1].double().flatten(0, 1)
    return nn.functional.cross_entropy(logits_TV, targets_BT[:, 1:].flatten()).item()


@contextmanager
def hidden_of(ffns: list[Any]) -> Iterator[list[Tensor]]:
    """What enters the down projections, in the order of the forward pass."""
    seen: list[Tensor] = []
    handles = [
        ffn.down.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for ffn in ffns
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def switch(model: PreTrainedModel, on: list[list[int]]) -> None:
    """Routers whose score depends on the expert alone: 1 where `on` has a 1, else 0."""
    with torch.no_grad():
        for ffn, bits in zip(expert_ffns(model), on, strict=True):
            ffn.router.weight.zero_()
            ffn.router.bias.copy_(200.0 * torch.tensor(bits) - 100.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_cross_entropy(family: str) -> None:
    model, blocks = build(family), text()
    expected = by_hand(model(input_ids=blocks).logits, blocks)
    seen = evaluate(model, blocks, batch_size=2)
    assert seen.nats_per_token == pytest.approx(expected, abs=1e-5)
    assert seen.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert seen.tokens == 3 * 7


@torch.no_grad()
def test_an_encoder_decoder_sees_the_block_on_both_sides() -> None:
    model, blocks = build("t5-gated"), text()
    expected = by_hand(model(input_ids=blocks, decoder_input_ids=blocks).logits, blocks)
    assert evaluate(model, blocks).nats_per_token == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_predicts_what_was_masked(family: str) -> None:
    model, blocks = build(family), text(length=20)
    shown: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, __: Any, arguments: dict[str, Tensor], output: Any) -> None:
        shown.append((arguments["input_ids"], output.logits))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    seen = evaluate(model, blocks, mask_token=MASK, batch_size=3)
    handle.remove()
    ((inputs, logits),) = shown
    masked = inputs == MASK
    assert masked.sum(1).tolist() == [3, 3, 3]  # 15 % of 20, in every block
    assert torch.equal(inputs[~masked], blocks[~masked])
    expected = nn.functional.cross_entropy(logits[masked], blocks[masked]).item()
    assert seen.nats_per_token == pytest.approx(expected, abs=1e-5)
    assert seen.tokens == 9


def test_the_seed_chooses_what_an_encoder_predicts() -> None:
    model, blocks = build("bert"), text(length=20)
    losses = [
        evaluate(model, blocks, mask_token=MASK, seed=seed, batch_size=size).nats_per_token
        for seed, size in ((0, 3), (0, 1), (1, 3))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] != pytest.approx(losses[2], abs=1e-3)


def test_batches_and_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = build("llama"), text(blocks=5)
    whole = evaluate(model, blocks, batch_size=5)
    monkeypatch.setattr("moe_tools.measure.evaluate.ROWS", 3)
    pieces = evaluate(model, blocks, batch_size=2)
    assert pieces.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-5)
    assert pieces.flops == whole.flops


def test_sparsity_of_handmade_routers() -> None:
    model, _ = routed(build("llama"))
    switch(model, [[1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]])
    seen = evaluate(model, text())
    assert seen.layer_sparsity == {
        "model.layers.0.mlp": pytest.approx(2 / 6),
        "model.layers.1.mlp": pytest.approx(3 / 6),
    }
    assert seen.ffn_sparsity == pytest.approx(5 / 12)


def test_a_longer_expert_counts_for_more() -> None:
    model, _ = routed(build("llama"), of_size(UNEVEN))
    switch(model, [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])  # of 10, 10, 10, 9 and 9 neurons
    seen = evaluate(model, text())
    assert list(seen.layer_sparsity.values()) == [
        pytest.approx(38 / 48),
        pytest.approx(39 / 48),
    ]
    assert seen.ffn_sparsity == pytest.approx(77 / 96)
    assert seen.flops.ffn == pytest.approx(seen.flops.ffn_dense * 19 / 96)


@every_family
@every_size
@torch.no_grad()
def test_sparsity_is_the_share_of_neurons_that_the_masks_turn_off(family: str, size: int) -> None:
    model, ffns = routed(build(family), of_size(size))
    randomize(model)
    blocks = text()
    inputs = {"input_ids": blocks}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = blocks
    if family in ENCODERS:  # the same tokens, whatever is masked
        blocks = inputs["input_ids"] = torch.full_like(blocks, MASK)
    with record_routing(model) as routings:
        model(**inputs)
    seen = evaluate(model, blocks, batch_size=2, mask_token=MASK)
    masks = {r.ffn: per_neuron(r.mask_TE, size) for r in routings}
    assert masks.keys() <= {ffn.name for ffn in ffns}
    shares = {name: 1 - mask_TF.float().mean().item() for name, mask_TF in masks.items()}
    bits = torch.cat([mask_TF.flatten() for mask_TF in masks.values()])
    assert seen.layer_sparsity == pytest.approx(shares, abs=1e-6)
    assert seen.ffn_sparsity == pytest.approx(1 - bits.float().mean().item(), abs=1e-6)
    assert 0 < seen.ffn_sparsity < 1


@every_family
def test_a_conversion_with_every_expert_on_measures_as_the_dense_model(family: str) -> None:
    donor, blocks = build(family), text()
    model, ffns = routed(donor)
    dense = evaluate(donor, blocks, mask_token=MASK)
    seen = evaluate(model, blocks, mask_token=MASK)
    assert seen.nats_per_token == pytest.approx(dense.nats_per_token, abs=1e-6)
    assert dense.ffn_sparsity == seen.ffn_sparsity == 0
    assert dense.layer_sparsity == {}
    assert set(seen.layer_sparsity) <= {ffn.name for ffn in ffns}
    assert seen.flops.ffn == seen.flops.ffn_dense == dense.flops.ffn == dense.flops.ffn_dense
    assert seen.flops.attention_and_rest == dense.flops.attention_and_rest
    assert dense.flops.router == 0 < seen.flops.router
    assert dense.flops.total == dense.flops.total_dense == seen.flops.total_dense


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_the_zeros_of_a_relu_model_are_counted(family: str) -> None:
    key = "activation_function" if family in ("gpt2", "opt") else "hidden_act"
    model = build(family, **{key: "relu"})
    with hidden_of(unfused_ffns(model)) as hidden:
        found = evaluate(model, text(), batch_size=2)
    seen = torch.cat([h_TF.flatten() for h_TF in hidden])
    assert found.zeros == pytest.approx(seen.eq(0).double().mean().item())
    assert 0.2 < found.zeros < 0.8
    assert found.ffn_sparsity == 0  # no router turned anything off
    every_expert_on, _ = routed(model)
    assert evaluate(every_expert_on, text()).zeros == pytest.approx(found.zeros)


@pytest.mark.parametrize(
    ("mode", "when_off"), [("hard", "zero"), ("hard", "mean"), ("soft", "zero")]
)
def test_the_zeros_of_a_routed_model_are_among_the_neurons_that_ran(
    mode: Any, when_off: Any
) -> None:
    model, ffns = routed(build("opt"), replace(THRESHOLD, when_off=when_off))
    randomize(model)
    set_mode(model, mode)
    if when_off == "mean":
        for ffn in ffns:
            ffn.off_F.uniform_(-1, 1)  # what is off and not 0 did not run
    with record_routing(model) as routings, hidden_of(ffns) as hidden:
        seen = evaluate(model, text(), batch_size=2)
    ran = [per_neuron(routing.mask_TE) for routing in routings]
    pairs = zip(ran, hidden, strict=True)
    zeros = sum(int((mask_TF & (h_TF == 0)).sum()) for mask_TF, h_TF in pairs)
    expected = zeros / sum(int(mask_TF.sum()) for mask_TF in ran)
    assert seen.zeros == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected < 0.8


def test_a_model_that_has_no_zeros_says_so() -> None:
    assert evaluate(build("llama"), text()).zeros is None
    assert evaluate(build("bert"), text(), mask_token=MASK).zeros is None


def test_an_expert_that_saw_no_token_has_no_sparsity() -> None:
    model, ffns = routed(build("mixtral"))
    seen = evaluate(model, torch.full((1, 2), 5), batch_size=1)
    assert 0 < len(seen.layer_sparsity) < len(ffns)


def test_a_model_is_left_as_it_was() -> None:
    model, ffns = routed(build("llama", dropout=0.5))
    randomize(model)
    model.train()
    model.lm_head.eval()
    before = copy.deepcopy(model.state_dict())
    assert evaluate(model, text()) != evaluate(model, text(length=9))
    assert model.training and not model.lm_head.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(ffn.observers for ffn in ffns)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off() -> None:
    model = build("llama", dropout=0.5).train()
    first, second = (evaluate(model, text()).nats_per_token for _ in range(2))
    assert first == second


def test_hooks_go_even_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ffns = routed(build("llama"))
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, text())
    assert not any(ffn.observers for ffn in ffns)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_soft_model_is_measured_softly() -> None:
    model, _ = routed(build("llama"))
    randomize(model)
    hard = evaluate(model, text())
    set_mode(model, "soft")
    soft = evaluate(model, text())
    assert soft.nats_per_token != hard.nats_per_token
    assert len(soft.layer_sparsity) == 2


def test_a_loss_that_is_no_number_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="nan nats"):
        evaluate(model, text())


@pytest.mark.parametrize(
    ("family", "blocks", "options", "message"),
    [
        ("llama", torch.zeros(0, 8, dtype=torch.long), {}, r"blocks are \(0, 8\)"),
        ("llama", torch.zeros(2, 1, dtype=torch.long), {}, "one block of two tokens"),
        ("llama", torch.zeros(2, 8, dtype=torch.long), {"batch_size": 0}, "batch_size is 0"),
        ("llama", torch.full((2, 8), 64), {}, "token 64 is outside the vocabulary"),
        ("opt", torch.zeros(2, 65, dtype=torch.long), {}, "use --block-length 64 or less"),
        ("bert", torch.zeros(2, 8, dtype=torch.long), {}, "needs the mask token"),
    ],
)
def test_mistakes_are_named(
    family: str, blocks: Tensor, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(build(family), blocks, **options)


def test_a_model_without_known_ffns_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="no FFN that moe-tools can find"):
        evaluate(model, text())


def test_handmade_masks_have_the_experts_they_should() -> None:
    model, ffns = routed(build("llama"))
    switch(model, [[1, 0, 0, 0, 0, 0]] * 2)
    assert [ffn.division.num_experts for ffn in ffns] == [EXPERTS] * 2
    assert evaluate(model, text()).ffn_sparsity == pytest.approx(5 / 6)
