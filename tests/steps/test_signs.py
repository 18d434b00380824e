"""Which way up rows point before dReLU: nothing changes before the swap, less is lost by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from moe_tools.experts.conversion import Conversion
from moe_tools.hosts.ffn import find_ffns
from moe_tools.recipe import Swap
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.signs import align_signs
from moe_tools.steps.swap import swap
from tests.families import build, logits

DONOR = Conversion("donor")
ALIGNED = Swap({"kind": "drelu"}, align=True)
GATED = ["llama", "gemma", "phi3", "t5-gated", "mixtral", "qwen2_moe"]


def text() -> Tensor:
    return torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", GATED)
@torch.no_grad()
def test_turning_neurons_changes_no_logit_and_keeps_the_larger_side(family: str) -> None:
    model = build(family)
    before, ffns = logits(model), find_ffns(model)
    ups = [ffn.weights().up_FD.clone() for ffn in ffns]
    shares = align_signs(model, text())
    assert torch.equal(logits(model), before)
    assert list(shares) == [ffn.name for ffn in ffns]
    turned = [(ffn.weights().up_FD != up).any() for ffn, up in zip(ffns, ups, strict=True)]
    assert all(turned)

    sides: list[list[Tensor]] = [[] for _ in ffns]

    def visit(index: int, x_TD: Tensor, _: Tensor) -> None:
        up_TF, gate_TF = ffns[index].projections.rows_TF(x_TD)
        assert gate_TF is not None
        sides[index].append(gate_TF.relu() * up_TF)

    visit_activations(model, text(), visit)
    for share, seen in zip(shares.values(), sides, strict=True):
        h_TF = torch.cat(seen)
        kept_F, lost_F = (side.relu().square().sum(0) for side in (h_TF, -h_TF))
        assert (kept_F >= lost_F).all()
        assert 0.5 <= share <= 1
        assert share == pytest.approx(float(kept_F.sum() / h_TF.square().sum()), rel=1e-4)


@torch.no_grad()
def test_an_aligned_swap_loses_less_than_a_plain_one() -> None:
    model = build("llama")
    plain, aligned = copy.deepcopy(model), copy.deepcopy(model)
    x_TD = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    swap(plain, Swap({"kind": "drelu"}), DONOR, text())
    kept = swap(aligned, ALIGNED, DONOR, text())["kept"]
    whole, *cut = (m.get_submodule("model.layers.0.mlp")(x_TD) for m in (model, plain, aligned))
    plain_error, aligned_error = ((whole - part_TD).square().sum() for part_TD in cut)
    assert aligned_error < 0.9 * plain_error
    assert all(0.5 < share < 1 for share in kept.values())


def test_a_rehearsal_turns_nothing() -> None:
    model, other = build("llama"), build("llama")
    other.load_state_dict(model.state_dict())
    ALIGNED.rehearse(model, "donor")
    swap(other, Swap({"kind": "drelu"}), DONOR, text())
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", Swap({"kind": "relu"}, align=True), "^swap: align chooses signs for drelu; relu"),
        ("opt", ALIGNED, "has no gate, which DReLU needs: use relu or fatrelu$"),
    ],
)
def test_a_mistake_changes_nothing(family: str, step: Swap, message: str) -> None:
    model = build(family)
    before = logits(model)
    for verb in (
        lambda: swap(model, step, DONOR, text()),
        lambda: step.rehearse(model, "donor"),
    ):
        with pytest.raises(ValueError, match=message):
            verb()
    assert torch.equal(logits(model), before)


def test_a_model_that_has_drelu_is_refused() -> None:
    model = build("llama")
    swap(model, ALIGNED, DONOR, text())
    before = logits(model)
    with pytest.raises(ValueError, match="is dReLU already: align before it, not after"):
        swap(model, ALIGNED, DONOR, text())
    assert torch.equal(logits(model), before)
