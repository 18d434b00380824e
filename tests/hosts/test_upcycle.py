"""A dense model as a Mixtral: the same function, whatever its routers say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralForCausalLM, PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion
from moe_tools.hosts.upcycle import upcycle
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.two_levels import TwoLevels
from moe_tools.recipe import Swap
from moe_tools.steps.swap import swap
from tests.families import FAMILIES, build, logits, routed

DONORS = {
    "llama": {"mlp_bias": False},
    "mistral": {"sliding_window": 4},
    "tied": {"mlp_bias": False, "tie_word_embeddings": True},
    "scaled rope": {
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    },
}
"""Each has a setting that Mixtral's default differs in."""


def donor(name: str = "llama", **config: Any) -> PreTrainedModel:
    family = name if name in FAMILIES else "llama"
    return build(family, rms_norm_eps=0.01, **DONORS[name] | config)


def routers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".mlp.gate." in key}


def assert_same(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", DONORS)
def test_an_upcycled_model_computes_what_its_donor_computes(name: str) -> None:
    dense = donor(name)
    model = upcycle(dense, num_experts=3, top_k=2)
    assert type(model) is MixtralForCausalLM
    assert not model.training
    assert_same(model, dense)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), experts=st.integers(1, 5), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_whatever_its_routers_say(data: st.DataObject, experts: int, scale: float) -> None:
    dense = donor()
    chosen = data.draw(st.integers(1, experts))
    model = upcycle(dense, num_experts=experts, top_k=chosen)
    assert {tuple(router.shape) for router in routers(model).values()} == {(experts, 16)}
    for router in routers(model).values():
        router.normal_(std=scale)
    assert_same(model, dense)


def test_a_token_passes_the_chosen_experts() -> None:
    text = torch.randint(3, 64, (2, 32))
    seen = evaluate(upcycle(donor(), num_experts=4, top_k=1), text)
    assert seen.two_levels == TwoLevels(experts=0.75, neurons=0.0)


def test_routers_are_drawn_from_the_seed_alone() -> None:
    dense, state = donor(), torch.random.get_rng_state()
    first = upcycle(dense, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = upcycle(dense, seed=1), upcycle(dense, seed=2)
    assert len(routers(first)) == 2
    for key, router in routers(first).items():
        assert router.unique().numel() == router.numel()
        assert torch.equal(router, routers(again)[key])
        assert not torch.equal(router, routers(other)[key])


def test_the_donor_shares_nothing_with_the_result() -> None:
    dense = donor()
    before, config = copy.deepcopy(dense.state_dict()), dense.config.to_dict()
    model = upcycle(dense, num_experts=2, top_k=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.config.rope_parameters["rope_theta"] = 1.0
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    assert dense.config.to_dict() == config


def test_dtype_and_generation_stay() -> None:
    dense = donor().to(torch.bfloat16)
    dense.generation_config.top_k = 7
    model = upcycle(dense)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.top_k == 7


def test_a_saved_one_is_a_stock_mixtral(tmp_path: Path) -> None:
    model = upcycle(donor(), num_experts=2)
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert_same(MixtralForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_a_donor_with_a_stock_activation_keeps_it() -> None:
    dense = donor()
    swap(dense, Swap({"kind": "relu"}), Conversion("donor"), torch.zeros(0, 0))
    assert_same(upcycle(dense), dense)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma", "mixtral"])
def test_other_families_are_named(family: str) -> None:
    name = FAMILIES[family].model.__name__
    with pytest.raises(
        ValueError, match=f"^{name} cannot be upcycled: give one of LlamaForCausalLM, Mistral"
    ):
        upcycle(build(family))


@pytest.mark.parametrize("chosen", [0, 3])
def test_more_experts_than_there_are_cannot_be_chosen(chosen: int) -> None:
    with pytest.raises(ValueError, match=f"^top_k is {chosen}, but must be between 1 and the 2"):
        upcycle(donor(), num_experts=2, top_k=chosen)


@pytest.mark.parametrize(
    ("bias", "where"), [("mlp_bias", "mlp.gate_proj"), ("attention_bias", "self_attn.q_proj")]
)
def test_biases_have_no_place(bias: str, where: str) -> None:
    with pytest.raises(ValueError, match=rf"{where}\.bias, but Mixtral has no biases"):
        upcycle(donor(**{bias: True}))


def test_an_activation_of_ours_comes_after() -> None:
    dense = donor()
    swap(dense, Swap({"kind": "drelu"}), Conversion("donor"), torch.zeros(0, 0))
    with pytest.raises(ValueError, match=r"activation 'moe_tools\.drelu.*upcycle first"):
        upcycle(dense)


def test_a_routed_donor_is_refused() -> None:
    model, _ = routed(donor())
    with pytest.raises(ValueError, match="is routed already: start from the dense model"):
        upcycle(model)


@pytest.mark.parametrize("noise", [-0.5, float("inf"), float("nan")])
def test_noise_is_a_number_of_0_or_more(noise: float) -> None:
    with pytest.raises(ValueError, match=rf"^noise is {noise}, but must be a number of 0 or more"):
        upcycle(donor(), noise=noise)


def test_noise_moves_the_logits_a_little() -> None:
    dense = donor()
    apart = [
        (logits(upcycle(dense, noise=noise)) - logits(dense)).abs().mean().item()
        for noise in (0.0, 0.01, 0.1)
    ]
    assert apart[0] < 1e-6 < apart[1] < apart[2] / 3
