"""Tiny llamas with predictors of single neurons, as PowerInfer takes them, and a vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.export.plan import Options
from moe_tools.export.powerinfer import PowerInferPlan, plan_powerinfer
from moe_tools.export.source import Source

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Those that GPT-2 writes as themselves; the others as the characters from 256 on."""
OTHERS = [byte for byte in range(256) if byte not in BYTES]
TOKENS = [chr(byte) if byte in BYTES else chr(256 + OTHERS.index(byte)) for byte in range(256)]
"""The token of a byte: its number is the byte's."""
VOCABULARY = [*TOKENS, TOKENS[0] + TOKENS[1], "<end>"]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
PREDICTORS: dict[str, Any] = {
    "expert_size": 1,
    "router": "low_rank",
    "router_options": {"rank": 16, "bias": False},
    "selector": {"kind": "threshold", "tau": 0.5},
}


def write_vocabulary(file: Path, tokens: list[str] = VOCABULARY, model: str = "gpt2") -> Path:
    """A GGUF file with a tokenizer alone, of single bytes."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges([f"{TOKENS[0]} {TOKENS[1]}"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def rounded(model: PreTrainedModel) -> None:
    """Gives it matrices that f16 holds, all but the predictors'."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ".router." not in name:
            parameter.copy_(parameter.half())


def llama(activation: str = "relu", *, mistral: bool = False, **config: Any) -> Any:
    """A random llama with random predictors, half of whose neurons run for a token."""
    sizes = {**SIZES, "initializer_range": 0.2, **config}
    model: Any
    if mistral:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    swap_activations(model, Conversion("donor", activation={"kind": activation}))
    swapped = read_conversion(model)
    assert swapped is not None
    attach_experts(model, replace(swapped, **PREDICTORS))
    model.requires_grad_(False)
    for ffn in expert_ffns(model):
        for parameter in ffn.router.parameters():
            parameter.normal_()
    rounded(model)
    return model


def written(model: PreTrainedModel, folder: Path) -> tuple[PowerInferPlan, Path]:
    """The file of a model, and its plan."""
    save(model, folder / "model")
    source = Source.read(str(folder / "model"))
    words = write_vocabulary(folder / "words.gguf")
    plan = plan_powerinfer(source, Options(tokenizer=str(words)))
    plan.write(source, folder / "out.gguf")
    return plan, folder / "out.gguf"
