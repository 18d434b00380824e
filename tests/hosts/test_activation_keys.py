"""Keys of a config that name an activation."""

from __future__ import annotations

from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from moe_tools.hosts.activation_keys import activation_keys

_BODY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_the_key_of_the_activation() -> None:
    model = BertForMaskedLM(BertConfig(**_BODY))
    before = model.config.to_dict()
    assert activation_keys(model) == {
        "hidden_act": {
            "bert.encoder.layer.0.intermediate.intermediate_act_fn",
            "bert.encoder.layer.1.intermediate.intermediate_act_fn",
            "cls.predictions.transform.transform_act_fn",
        }
    }
    assert model.config.to_dict() == before


def test_a_key_of_a_part_of_the_config() -> None:
    config = Gemma3Config(
        text_config=_BODY | {"model_type": "gemma3_text"},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    found = activation_keys(Gemma3ForConditionalGeneration(config))
    assert list(found) == ["text_config.hidden_activation", "vision_config.hidden_act"]
    assert found["text_config.hidden_activation"] == {
        f"model.language_model.layers.{i}.mlp.act_fn" for i in range(2)
    }


def test_a_host_with_a_table_of_few_names() -> None:
    config = OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    paths = {f"transformer.h.{i}.mlp.act" for i in range(2)}
    assert activation_keys(OpenAIGPTLMHeadModel(config)) == {"afn": paths}
