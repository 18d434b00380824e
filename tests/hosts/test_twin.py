"""Twins: tiny, of the same family, and with all that makes its FFNs what they are."""

import warnings

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.twin import build_twin, shrink

CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "falcon": "FalconForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "jamba": "JambaForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}
every_family = pytest.mark.parametrize("family", CLASSES)


def default(family: str) -> transformers.PreTrainedConfig:
    return CONFIG_MAPPING[family]()


def twin(family: str, **options: int) -> PreTrainedModel:
    return build_twin(getattr(transformers, CLASSES[family]), shrink(default(family), **options))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(**model_inputs(model, ids)).logits


@every_family
def test_a_twin_is_tiny_and_runs(family: str) -> None:
    model = twin(family)
    assert sum(tensor.numel() for tensor in model.parameters()) < 200_000
    assert logits(model).isfinite().all()
    assert not model.training


@every_family
def test_no_parameter_of_a_twin_is_constant(family: str) -> None:
    for name, tensor in twin(family).named_parameters():
        assert tensor.dtype == torch.float32
        assert tensor.unique().numel() > tensor.numel() // 2, name


@every_family
def test_odd_sizes_are_possible(family: str) -> None:
    model = twin(family, width=20, neurons=45)
    sizes = {size for tensor in model.parameters() for size in tensor.shape}
    assert 20 in sizes
    assert sizes & {45, 37}  # some families have nothing but experts, of 8 neurons fewer
    assert logits(model).isfinite().all()


def test_every_kind_of_layer_stays() -> None:
    for family in ("gemma3n_text", "gemma4_text", "qwen3_next", "deepseek_v3"):
        before, after = default(family), shrink(default(family))
        for key in ("layer_types", "mlp_layer_types"):
            kinds = getattr(before, key, None) or []
            assert set(getattr(after, key, None) or []) == set(kinds)
        assert after.num_hidden_layers <= 6


def test_what_an_ffn_computes_stays() -> None:
    config = transformers.FalconH1Config(
        mlp_multipliers=[1.3, 0.7], hidden_act="gelu", mlp_bias=True
    )
    small = shrink(config)
    assert (small.mlp_multipliers, small.hidden_act, small.mlp_bias) == ([1.3, 0.7], "gelu", True)
    limited = shrink(transformers.GptOssConfig(attention_dropout=0.25))
    assert limited.attention_dropout == 0.25


def test_grouped_attention_stays_grouped() -> None:
    assert shrink(transformers.LlamaConfig(num_key_value_heads=8)).num_key_value_heads == 1
    assert shrink(transformers.LlamaConfig()).num_key_value_heads == 2


def test_numbers_of_layers_follow_those_that_are_kept() -> None:
    config = transformers.Qwen3MoeConfig(num_hidden_layers=12, mlp_only_layers=[3, 7])
    small = shrink(config)
    assert (small.num_hidden_layers, small.mlp_only_layers) == (2, [1])


def test_the_configuration_that_is_given_stays() -> None:
    config = default("qwen3_next")
    before = config.to_dict()
    small = shrink(config)
    build_twin(transformers.Qwen3NextForCausalLM, small)
    assert config.to_dict() == before
    assert shrink(small).to_dict() == small.to_dict()


def test_a_seed_makes_the_model_and_leaves_the_global_one() -> None:
    state = torch.get_rng_state()
    first, second = twin("llama"), twin("llama")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(first), logits(second))
    other = build_twin(transformers.LlamaForCausalLM, first.config, seed=1)
    assert not torch.equal(logits(first), logits(other))


def test_a_composite_gives_its_language_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_twin(transformers.Qwen3_5ForCausalLM, shrink(default("qwen3_5")))
    assert model.config.model_type == "qwen3_5_text"
    assert logits(model).isfinite().all()


def test_a_family_that_refuses_says_why_in_a_line() -> None:
    small = shrink(default("gpt2"))
    small.n_head = 5
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot be built .*num_heads"):
        build_twin(transformers.GPT2LMHeadModel, small)
