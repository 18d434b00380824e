"""The sizes of the papers' own models, as their configurations on the hub have them."""

from __future__ import annotations

from transformers import (
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

_LLAMA = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}

CONFIGS: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama2-7b": (
        LlamaConfig(
            **_LLAMA,
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        6_738_415_616,
    ),
    "llama2-13b": (
        LlamaConfig(
            **_LLAMA,
            vocab_size=32000,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
        ),
        13_015_864_320,
    ),
    "minicpm-1b": (  # arXiv 2404.06395, whose 1,247,442,432 leave the embedding out
        LlamaConfig(
            **_LLAMA,
            vocab_size=73440,
            hidden_size=1536,
            intermediate_size=3840,
            num_hidden_layers=52,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        1_247_442_432 + 73440 * 1536,
    ),
    "smollm2-135m": (
        LlamaConfig(
            **_LLAMA,
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "mistral-7b": (
        MistralConfig(
            architectures=["MistralForCausalLM"],
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        7_241_732_096,
    ),
    "mixtral-8x7b": (
        MixtralConfig(
            architectures=["MixtralForCausalLM"],
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        46_702_792_704,
    ),
    "gemma-2b": (
        GemmaConfig(
            architectures=["GemmaForCausalLM"],
            vocab_size=256000,
            hidden_size=2048,
            intermediate_size=16384,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=256,
        ),
        2_506_172_416,
    ),
    "gpt2": (GPT2Config(architectures=["GPT2LMHeadModel"]), 124_439_808),
    "gpt2-medium": (
        GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=1024, n_layer=24, n_head=16),
        354_823_168,
    ),
    "t5-large": (
        T5Config(
            architectures=["T5ForConditionalGeneration"],
            d_model=1024,
            d_ff=4096,
            num_layers=24,
            decoder_start_token_id=0,  # as google-t5/t5-large has it
            num_heads=16,
        ),
        737_668_096,
    ),
    "roberta-base": (  # as a classifier of two classes
        RobertaConfig(
            architectures=["RobertaForMaskedLM"],
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
        ),
        124_647_170,
    ),
    "bert-large": (  # as a classifier of two classes
        BertConfig(
            architectures=["BertForMaskedLM"],
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
        335_143_938,
    ),
    "minilm": (  # as a classifier of two classes
        BertConfig(
            architectures=["BertModel"],
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=12,
        ),
        22_713_986,
    ),
}
"""Name -> its configuration, and how many parameters the model has."""

OF_RECIPE = {
    "lte_llama2_7b": "llama2-7b",
    "lte_gpt2_medium": "gpt2-medium",
    "lte_roberta_base": "roberta-base",
    "lte_minilm": "minilm",
    "moefication_minilm": "minilm",
    "moefication_t5_large": "t5-large",
    "predictors": "t5-large",
    "moefication_bert_large": "bert-large",
    "prosparse_7b": "llama2-7b",
    "prosparse_13b": "llama2-13b",
    "prosparse_1b": "minicpm-1b",
    "turbosparse_mistral_7b": "mistral-7b",
    "turbosparse_mixtral_8x7b": "mixtral-8x7b",
    "d2dmoe_gpt2": "gpt2",
    "d2dmoe_gemma_2b": "gemma-2b",
    "cmoe_llama2_7b": "llama2-7b",
}
"""Recipe -> the model that it is for; any other recipe is tried on `smollm2-135m`."""
