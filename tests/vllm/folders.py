"""Tiny converted folders of every kind that vLLM is to run, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from tests.families import build

WIDER = {"hidden_size": 64, "max_position_embeddings": 256, "num_attention_heads": 2}
"""vLLM's attention on a CPU takes heads of 32 or 64, and no smaller ones."""
TOPK = {"kind": "topk", "k": 3}
HALF = {"kind": "threshold", "tau": 0.5}


def wider(family: str, **config: Any) -> PreTrainedModel:
    """A tiny dense model of a family, with heads that vLLM takes."""
    sizes = WIDER | ({"head_dim": 32} if family in ("qwen3", "gemma", "gemma2", "gemma3") else {})
    return build(family, **sizes | config)


def routed(
    model: PreTrainedModel,
    router: str = "sigmoid",
    selector: dict[str, Any] = TOPK,
    size: int = 8,
    **more: Any,
) -> PreTrainedModel:
    """Attaches routers whose numbers are noise, in place."""
    attach_experts(model, Conversion("donor", size, router, selector, **more))
    with torch.no_grad():
        for ffn in expert_ffns(model):
            for name in ffn.added():
                tensor = ffn.get_buffer(name) if name in dict(ffn.named_buffers()) else None
                tensor = ffn.get_parameter(name) if tensor is None else tensor
                if tensor.is_floating_point() and name not in ("router.norm_F", "router.moment_D"):
                    tensor.normal_(std=0.3)
    return model


def swapped(model: PreTrainedModel, kind: str, **options: Any) -> PreTrainedModel:
    """Gives every FFN another activation, in place."""
    swap_activations(model, Conversion("donor", activation={"kind": kind, **options}))
    return model


def swapped_and_routed() -> PreTrainedModel:
    """Routers on FFNs whose activation joins gate and up rows."""
    model = swapped(wider("llama"), "drelu")
    said = Conversion.from_dict(model.config.moe_tools)
    half = {"kind": "topk", "share": 0.5}
    attach_experts(model, replace(said, expert_size=8, router="oracle", selector=half))
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "topk": lambda: routed(wider("llama")),
    "threshold": lambda: routed(wider("llama"), selector=HALF),
    "shared": lambda: routed(wider("mistral"), shared_experts=2),
    "uneven": lambda: routed(wider("qwen2"), selector={"kind": "dynamic_k", "tau": 0.7}, size=10),
    "top_p": lambda: routed(wider("qwen3"), selector={"kind": "top_p", "p": 0.6}),
    "soft": lambda: routed(wider("llama"), mode="soft"),
    "weighted": lambda: routed(wider("llama"), "softmax", mode="weighted"),
    "mean": lambda: routed(wider("llama"), when_off="mean"),
    "constants": lambda: routed(wider("llama"), constants=True),
    "mlp": lambda: routed(wider("llama"), "mlp"),
    "low_rank": lambda: routed(wider("llama"), "low_rank", HALF, size=1),
    "bottleneck": lambda: routed(wider("llama"), "bottleneck", HALF, size=1),
    "norm": lambda: routed(wider("llama"), "norm", {"kind": "topk", "k": 2}),
    "similarity": lambda: routed(wider("llama"), "similarity"),
    "mean_gate": lambda: routed(wider("qwen2"), "mean_gate"),
    "representative": lambda: routed(wider("qwen2"), "representative"),
    "oracle": lambda: routed(wider("llama"), "oracle"),
    "cats": lambda: routed(wider("qwen2"), "cats", {"kind": "threshold", "tau": 0.3}, size=1),
    "few_bits": lambda: routed(
        wider("qwen2"), "few_bits", {"kind": "threshold", "tau": 0.3}, size=1
    ),
    "sign": lambda: routed(swapped(wider("llama"), "relu"), "sign", HALF, size=1),
    "int8_gate": lambda: routed(swapped(wider("llama"), "relu"), "int8_gate", HALF, size=1),
    "relu": lambda: swapped(wider("llama"), "relu"),
    "relu2": lambda: swapped(wider("qwen2"), "relu2"),
    "fatrelu": lambda: swapped(wider("llama"), "fatrelu", theta=0.01),
    "drelu": lambda: swapped(wider("qwen3"), "drelu"),
    "drelu_routed": swapped_and_routed,
    "phi3": lambda: routed(wider("phi3")),
    "gemma2": lambda: routed(wider("gemma2")),
    "gemma3": lambda: routed(wider("gemma3")),
    "opt": lambda: routed(wider("opt", word_embed_proj_dim=64)),
    "gpt_neox": lambda: routed(wider("gpt_neox")),
}


def write(folder: Path, name: str) -> None:
    """A folder of `MODELS`."""
    torch.manual_seed(0)
    save(MODELS[name](), folder)
