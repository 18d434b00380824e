"""Every FFN is compared with its host before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, T5GemmaForConditionalGeneration, XLNetLMHeadModel

from moe_tools.experts.conversion import attach_experts
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.proof import settle
from moe_tools.hosts.rows import rows_of
from moe_tools.hosts.twin import build_twin, shrink
from tests.families import FAMILIES, THRESHOLD, build, force_on, logits, model_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proof_changes_nothing(family: str) -> None:
    model = build(family)
    before, random = logits(model), torch.get_rng_state()
    names = [ffn.name for ffn in find_ffns(model)]
    settle(model)
    assert torch.equal(logits(model), before) and torch.equal(torch.get_rng_state(), random)
    assert not any(row.masked for row in rows_of(model).values())
    assert [ffn.name for ffn in find_ffns(model)] == names
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == [] and not any(module.training for module in model.modules())


def _class_with(change: str) -> type[nn.Module]:
    """LlamaMLP, but for one thing."""

    class MLP(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.act_fn = mlp.act_fn
            self.norm_F = nn.Parameter(torch.rand(48))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if change == "limit":
                gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            factors = {"multiplier": 1.3, "a little": 1.001}
            h = self.act_fn(gate * factors.get(change, 1.0)) * up
            if change == "statistics":  # as gemma3n's sparse layers
                h = nn.functional.relu(h - h.mean(-1, keepdim=True) - h.std(-1, keepdim=True))
            if change == "norm":  # as bitnet
                h = nn.functional.rms_norm(h, (48,), self.norm_F)
            if change == "dropout":
                h = nn.functional.dropout(h, 0.5, self.training)
            y = self.down_proj(h)
            return 0.7 * y if change == "scale" else y

    return MLP


def _changed(change: str) -> nn.Module:
    model = build("llama")
    layer = model.model.layers[1]
    layer.mlp = _class_with(change)(layer.mlp).eval()
    return model


@pytest.mark.parametrize("change", ["limit", "multiplier", "scale", "statistics", "dropout"])
def test_what_only_the_host_knows_is_masked_and_exact(change: str) -> None:
    model = _changed(change)
    dense = logits(model)
    settle(model)
    assert [row.masked for row in rows_of(model).values()] == [False, True]
    attach_experts(model, THRESHOLD)
    force_on(model)
    assert torch.equal(logits(model), dense)
    for ffn in expert_ffns(model):
        ffn.router.bias.data.zero_()
        ffn.router.weight.data.normal_()
    assert not torch.equal(logits(model), dense)
    with every_expert_on(model):
        assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_hide_no_difference(dtype: torch.dtype) -> None:
    model = _changed("a little").to(dtype)
    settle(model)
    assert [row.masked for row in rows_of(model).values()] == [False, True]


def test_coupled_neurons_are_refused_with_the_reason() -> None:
    model = _changed("norm")
    before = {path: type(module) for path, module in model.named_modules()}
    message = (
        r"^model\.layers\.1\.mlp \(MLP\) cannot be converted: its hidden activations differ from "
        r"our formula by \S+ of the largest, and its neurons are coupled: shuffled, they differ by"
    )
    with pytest.raises(ValueError, match=message):
        attach_experts(model, THRESHOLD)
    assert {path: type(module) for path, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [("t5gemma", ("dropout", None, False)), ("xlnet", (None, None, True))],
    ids=["in the module", "in the layer, used twice"],
)
def test_dropout_between_the_activation_and_down_is_found(
    name: str, expected: tuple[str | None, str | None, bool]
) -> None:
    kinds = {"t5gemma": T5GemmaForConditionalGeneration, "xlnet": XLNetLMHeadModel}
    donor = build_twin(kinds[name], shrink(AutoConfig.for_model(name)))
    model = copy.deepcopy(donor)
    settle(model)
    found = {
        (row.hidden_dropout, row.output_dropout, row.masked) for row in rows_of(model).values()
    }
    assert found == {expected}
    attach_experts(model, THRESHOLD)
    force_on(model)
    outputs = []
    for each in (donor.train(), model.train()):
        torch.manual_seed(1)
        outputs.append(each(**model_inputs(donor)).logits)
    assert torch.equal(*outputs)


def test_a_multiplier_of_one_is_no_difference() -> None:
    model = _changed("none")
    settle(model)
    assert not any(row.masked for row in rows_of(model).values())
