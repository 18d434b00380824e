"""Perplexity under cuts, beside a model whose small neurons are zeroed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.natural import observe
from moe_tools.measure.truncation import sparsity_within, truncated
from tests.families import build, logits, randomize, routed


def text(blocks: int = 4, length: int = 12) -> Tensor:
    return torch.randint(5, 64, (blocks, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "mixtral"])
@torch.no_grad()
def test_neurons_below_the_cut_say_nothing(family: str) -> None:
    model = build(family)
    ffn = unfused_ffns(model)[0]
    h_TF = torch.randn(5, 48)
    norms_TF = h_TF.abs() * ffn.weights().down_norm_F
    cut = norms_TF.median().item()
    expected = ffn.down(h_TF * (norms_TF > cut))
    with truncated(model, {ffn.name: cut}) as count:
        assert torch.equal(ffn.down(h_TF), expected)
    assert (count.seen, count.left_out) == (240, 120)
    assert count.sparsity == 0.5
    assert not torch.equal(ffn.down(h_TF), expected)


def test_without_cuts_nothing_changes() -> None:
    model = build("llama")
    before = logits(model)
    with truncated(model, {}) as count:
        assert torch.equal(logits(model), before)
    assert count.sparsity == 0
    with truncated(model, {ffn.name: 0.0 for ffn in unfused_ffns(model)}):
        assert torch.equal(logits(model), before)


def test_a_converted_model_is_truncated_with_every_expert_on() -> None:
    donor = build("llama")
    model, _ = routed(donor)
    randomize(model)
    cuts = {acts.name: acts.cut(0.3) for acts in observe(donor, text())}
    with truncated(model, cuts) as mine, truncated(donor, cuts) as dense:
        assert torch.allclose(logits(model), logits(donor), atol=1e-5)
    assert mine.sparsity == pytest.approx(dense.sparsity, abs=0.01)


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("increase", [0.01, 0.1])
def test_the_sparsity_is_the_largest_within_the_increase(act: str, increase: float) -> None:
    model, blocks_BT = build("llama", hidden_act=act), text()
    dense = evaluate(model, blocks_BT).perplexity
    found = sparsity_within(model, blocks_BT, increase)
    assert found.dense_perplexity == pytest.approx(dense, rel=1e-6)
    assert found.perplexity <= dense * (1 + increase)
    seen = observe(model, blocks_BT)

    def ratio(cett: float) -> float:
        with truncated(model, {acts.name: acts.cut(cett) for acts in seen}):
            return evaluate(model, blocks_BT).perplexity / dense

    assert ratio(found.cett) == pytest.approx(found.perplexity / dense, rel=1e-6)
    assert ratio(min(1.0, found.cett + 2 / 1024)) > 1 + increase or found.cett > 0.99
    assert 0 < found.sparsity < 1


def test_more_perplexity_buys_more_sparsity() -> None:
    model = build("llama", hidden_act="relu")
    shares = [sparsity_within(model, text(), p).sparsity for p in (0.001, 0.02, 0.2)]
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("increase", [0.0, -1.0, math.nan])
def test_an_increase_is_above_0(increase: float) -> None:
    with pytest.raises(ValueError, match=r"the increase is .*, but must be above 0"):
        sparsity_within(build("llama"), text(), increase)


def test_hooks_go_even_when_the_model_fails() -> None:
    model = build("llama")
    with pytest.raises(RuntimeError), truncated(model, {f.name: 1.0 for f in unfused_ffns(model)}):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in model.modules())
