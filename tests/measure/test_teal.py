"""TEAL on tiny models: what is dropped, what is read, and that nothing stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.teal import inputs_dropped, read_shares, with_reads
from tests.families import FAMILIES, build, logits

TEXT_BT = torch.randint(5, 64, (4, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_the_dense_model_and_so_it_is_afterwards(family: str) -> None:
    model = build(family)
    dense = logits(model)
    with inputs_dropped(model, 0.0, TEXT_BT) as sites:
        assert torch.equal(logits(model), dense)
    assert read_shares(sites)[1] == 1
    with inputs_dropped(model, 0.5, TEXT_BT):
        assert not torch.equal(logits(model), dense)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
@torch.no_grad()
def test_columns_that_are_read_are_those_of_numbers_that_are_left(
    family: str, sparsity: float
) -> None:
    """Counted again behind the hooks, for groups of tokens that are far apart."""
    model = build(family)
    entered: dict[int, list[Tensor]] = {}

    def keep(matrix: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.setdefault(id(matrix), []).append(args[0].flatten(0, -2) != 0)

    with inputs_dropped(model, sparsity, TEXT_BT) as sites:
        handles = [site.matrix.register_forward_pre_hook(keep) for site in sites]
        model(input_ids=TEXT_BT)
        for handle in handles:
            handle.remove()
    shares = read_shares(sites)
    weights = [site.weights for site in sites]
    assert sum(weights) == sum(ffn.projections.numbers for ffn in unfused_ffns(model))
    left = [torch.cat(entered.get(id(site.matrix), [torch.zeros(0, 1)])) for site in sites]
    pairs = list(zip(weights, left, strict=True))
    read = sum(weight * float(kept.float().mean(1).sum()) for weight, kept in pairs)
    whole = sum(weight * len(kept) for weight, kept in pairs)
    assert shares[1] == pytest.approx(read / whole, rel=1e-6)
    assert shares[1] == pytest.approx(1 - sparsity, abs=0.06)  # later layers see other inputs
    assert shares[1] < shares[4] < shares[16] <= 1
    if family == "mixtral":
        return  # its experts see other tokens each
    for size in (4, 16):
        unions = [kept.view(size, -1, kept.shape[1]).any(0) for kept in left]
        pairs = list(zip(weights, unions, strict=True))
        read = sum(weight * float(kept.float().mean()) for weight, kept in pairs)
        assert shares[size] == pytest.approx(read / sum(weights), rel=1e-6)


def test_figures_become_those_of_what_was_read() -> None:
    model = build("llama")
    with inputs_dropped(model, 0.5, TEXT_BT) as sites:
        seen = evaluate(model, TEXT_BT)
    shares = read_shares(sites)
    found = with_reads(seen, shares)
    assert found.flops.ffn_share == pytest.approx(shares[1])
    assert found.ffn_sparsity == pytest.approx(1 - shares[1])
    assert found.flops.attention_and_rest == seen.flops.attention_and_rest
    for size in (1, 4, 16):
        assert found.traffic[size].ffn_share == pytest.approx(shares[size])
        assert found.traffic[size].rest == seen.traffic[size].rest
    assert list(with_reads(seen, {1: 0.5}).traffic) == [1]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_cannot_be(sparsity: float) -> None:
    with (
        pytest.raises(ValueError, match=r"must be in \[0, 1\)"),
        inputs_dropped(build("llama"), sparsity, TEXT_BT),
    ):
        pass
