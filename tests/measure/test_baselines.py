"""TEAL and CATS on tiny models: what is dropped, what that saves, and that nothing stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.hosts.ffn import find_ffns
from moe_tools.measure.baselines import thresholded
from tests.families import FAMILIES, build, logits

TEXT_BT = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(3))
every_kind = pytest.mark.parametrize("kind", ["teal", "cats"])


@every_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_the_dense_model_and_so_it_is_afterwards(family: str, kind: str) -> None:
    model = build(family)
    dense = logits(model)
    with thresholded(model, kind, 0.0, TEXT_BT) as sites:
        assert torch.equal(logits(model), dense)
    assert all(site.saved == 0 for site in sites)
    with thresholded(model, kind, 0.5, TEXT_BT):
        assert not torch.equal(logits(model), dense)
    assert torch.equal(logits(model), dense)


@every_kind
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
@torch.no_grad()
def test_what_is_saved(family: str, kind: str, sparsity: float) -> None:
    model = build(family)
    with thresholded(model, kind, sparsity, TEXT_BT) as sites:
        model(input_ids=TEXT_BT)
    weights = find_ffns(model)[0].weights()
    matrices = [matrix.numel() for matrix in weights.matrices()]
    dense = 2 * TEXT_BT.numel() * sum(matrices) * len(find_ffns(model))
    droppable = 1.0 if kind == "teal" else (2 / 3 if weights.gate_FD is not None else 1 / 2)
    saved = sum(site.saved for site in sites) / dense
    assert saved == pytest.approx(sparsity * droppable, abs=0.06)  # later layers see other inputs


@torch.no_grad()
def test_cats_keeps_the_neurons_of_the_largest_gates() -> None:
    model = build("llama")
    ffn = find_ffns(model)[0]
    seen: dict[str, Tensor] = {}
    with thresholded(model, "cats", 0.5, TEXT_BT):
        handle = ffn.projections.down.register_forward_pre_hook(
            lambda _, args: seen.update(h=args[0])
        )
        gates = ffn.projections.gate.register_forward_hook(
            lambda _, __, output: seen.update(gate=output)
        )
        model(input_ids=TEXT_BT)
        handle.remove()
        gates.remove()
    size_TF = torch.nn.functional.silu(seen["gate"]).abs()
    off_TF = seen["h"] == 0
    assert off_TF.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert size_TF[off_TF].max() <= size_TF[~off_TF].min()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_cannot_be(sparsity: float) -> None:
    with (
        pytest.raises(ValueError, match=r"must be in \[0, 1\)"),
        thresholded(build("llama"), "teal", sparsity, TEXT_BT),
    ):
        pass
