"""Zeros and CETT of activations, by hand and beside slow twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.natural import Activations, natural_sparsity, observe
from tests.families import FAMILIES, NEURONS, THRESHOLD, build, model_inputs, randomize, routed


def text(blocks: int = 3, length: int = 8) -> Tensor:
    return torch.randint(5, 64, (blocks, length), generator=torch.Generator().manual_seed(7))


def hand() -> Activations:
    """Two tokens, three neurons; W_down is diagonal, so the norms of outputs are those of its rows:
    3, 4, 0 and 6, 0, 8.
    """
    hidden_TF = torch.tensor([[3.0, -2.0, 0.0], [6.0, 0.0, 0.5]])
    return Activations("ffn", hidden_TF, torch.diag(torch.tensor([1.0, -2.0, 16.0])))


def test_zeros_and_a_threshold_by_hand() -> None:
    acts = hand()
    assert acts.zeros == pytest.approx(2 / 6)
    assert acts.below(0.5) == pytest.approx(2 / 6)
    assert acts.below(2.5) == pytest.approx(4 / 6)
    assert acts.below(0.0) == 0


def test_the_error_without_small_outputs_by_hand() -> None:
    acts = hand()
    errors = {cut: acts.cett(cut) for cut in (0.0, 3.5, 5.0, 6.0, 8.0)}
    assert errors == pytest.approx(
        {0.0: 0, 3.5: (3 / 5) / 2, 5.0: (5 / 5) / 2, 6.0: (1 + 6 / 10) / 2, 8.0: 1}
    )
    shares = [acts.sparsity(cut) for cut in (0.0, 3.5, 5.0, 6.0, 8.0)]
    assert shares == pytest.approx([2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])


@pytest.mark.parametrize(
    ("cett", "cut"),
    [(0.0, 0.0), (0.29, 0.0), (0.31, 3.0), (0.51, 4.0), (0.81, 6.0), (1.0, math.inf)],
)
def test_the_cut_is_the_largest_within_the_error(cett: float, cut: float) -> None:
    assert hand().cut(cett) == cut


def test_a_token_without_output_has_no_error() -> None:
    acts = Activations("ffn", torch.zeros(2, 4), torch.randn(4, 3))
    assert acts.cut(0.0) == math.inf and acts.sparsity(0.0) == acts.zeros == 1
    assert acts.cett(math.inf) == 0


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_a_larger_error_leaves_out_at_least_as_much(seed: int, cett: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    acts = Activations(
        "ffn", torch.randn(5, 40, generator=draw), torch.randn(40, 7, generator=draw)
    )
    cut = acts.cut(cett)
    assert acts.cett(cut) <= cett
    assert acts.cut(cett / 2) <= cut
    assert acts.cett(math.inf) == pytest.approx(1)


def test_many_neurons_are_cut_to_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuts are quantiles of a sample; every norm of a smaller FFN is tried."""
    acts = Activations("ffn", torch.randn(64, 512), torch.randn(512, 16))
    fast = acts.sparsity(acts.cut(0.2))
    every = acts._norms_TF().flatten().sort().values
    slow = max(k for k in range(0, len(every), 16) if acts.cett(every[k].item()) <= 0.2)
    assert fast == pytest.approx(slow / len(every), abs=2e-3)
    monkeypatch.setattr("moe_tools.measure.natural.SAMPLE", 4096)
    assert acts.sparsity(acts.cut(0.2)) == pytest.approx(fast, abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_enters_the_down_projections(family: str) -> None:
    model = build(family)
    seen: dict[str, list[Tensor]] = {}
    for ffn in unfused_ffns(model):
        ffn.down.register_forward_pre_hook(
            lambda _, args, name=ffn.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    found = observe(model, text())
    by_name = {ffn.name: ffn for ffn in unfused_ffns(model)}
    assert {acts.name for acts in found} == set(seen)
    for acts in found:
        assert torch.equal(acts.hidden_TF, torch.cat(seen[acts.name]))
        down = by_name[acts.name].projections.down
        bias = 0 if getattr(down, "bias", None) is None else down.bias
        whole_TD = acts.hidden_TF @ acts.down_FD
        assert torch.allclose(whole_TD, down(acts.hidden_TF) - bias, atol=1e-4)


def test_an_expert_sees_its_tokens_and_one_that_saw_none_is_left_out() -> None:
    model = build("mixtral")
    every, few = observe(model, text()), observe(model, torch.full((1, 2), 5))
    assert 0 < len(few) < 8
    assert sum(len(acts.hidden_TF) for acts in every) == 3 * 8 * 2 * 2  # 2 layers, 2 experts each


def test_a_converted_model_is_seen_as_its_donor() -> None:
    donor = build("llama")
    model, _ = routed(donor, THRESHOLD)
    randomize(model)
    for mine, dense in zip(observe(model, text()), observe(donor, text()), strict=True):
        assert mine.name == dense.name
        assert torch.allclose(mine.hidden_TF, dense.hidden_TF, atol=1e-5)


def test_batches_do_not_matter_and_nothing_stays() -> None:
    model = build("llama", dropout=0.5).train()
    one, other = observe(model, text(5), batch_size=1), observe(model, text(5), batch_size=5)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a.hidden_TF, b.hidden_TF, atol=1e-5)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_weighs_ffns_by_what_they_ran() -> None:
    small = Activations("small", torch.tensor([[0.0, 1.0]]), torch.eye(2))
    large = Activations("large", torch.ones(3, 4), torch.eye(4))
    found = natural_sparsity([small, large], 0.0)
    assert [(ffn.tokens, ffn.neurons) for ffn in found.ffns] == [(1, 2), (3, 4)]
    assert found.zeros == found.sparsity == pytest.approx(1 / 14)
    assert [ffn.zeros for ffn in found.ffns] == [0.5, 0]


def test_relu_is_sparser_than_silu_at_the_same_error() -> None:
    relu, silu = (
        natural_sparsity(observe(build("llama", hidden_act=act), text()), 0.2)
        for act in ("relu", "silu")
    )
    assert relu.zeros > 0.3 and silu.zeros == 0
    assert relu.sparsity > relu.zeros
    assert {ffn.neurons for ffn in relu.ffns} == {NEURONS}
    assert 0 < silu.sparsity < 1


@pytest.mark.parametrize("cett", [-0.1, 1.1, math.nan])
def test_an_error_is_a_share(cett: float) -> None:
    with pytest.raises(ValueError, match=r"cett is .*, but must be in \[0, 1\]"):
        natural_sparsity([hand()], cett)


def test_every_family_gets_the_same_inputs_as_elsewhere() -> None:
    assert len(observe(build("t5-gated"), model_inputs(build("t5-gated"))["input_ids"])) == 4
