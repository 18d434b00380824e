"""Writes a tiny llama as a GGUF file, as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_tools.export.gguf import LAYER

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Writes weights in fp32; biases of the FFNs have no name there and are left out."""
    config, words = model.config, tokenizer.get_vocab()
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    listed = sorted(words, key=words.__getitem__)
    listed[-3:] = ["w", "1", "w1"]  # what merges are made of
    listed += [f"<{index}>" for index in range(len(listed), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(listed)
    writer.add_token_types([TokenType.NORMAL] * len(listed))
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if (stored := _name(name)) is not None:
            writer.add_tensor(stored, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str | None:
    if name in OUTSIDE or not name.startswith("model.layers."):
        return OUTSIDE.get(name)
    _, _, number, rest = name.split(".", 3)
    inside, _, leaf = rest.rpartition(".")
    return f"blk.{number}.{LAYER[inside]}.{leaf}" if leaf == "weight" else None
