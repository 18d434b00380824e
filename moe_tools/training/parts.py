"""Which weights a train step trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from moe_tools.experts.experts import LEARNING, expert_ffns
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.training.lora import adapters

if TYPE_CHECKING:
    from moe_tools.training.train import Train


def trainable_parts(model: PreTrainedModel, step: Train) -> list[dict[str, Any]]:
    """Optimizer groups: the host's weights and the routers, each with its learning rate."""
    routed = expert_ffns(model)
    routers = [p for ffn in routed for p in ffn.router.parameters()]
    if step.lora is not None:
        host = adapters(model)
    elif step.parts == "all":
        known = {id(p) for p in routers}
        host = [p for p in model.parameters() if id(p) not in known]
    elif step.parts == "layers":
        host = layer_parameters(model)
    elif step.parts == "ffn":
        host = _ffn_parameters(model)
    else:
        host = []
    groups = [{"params": host, "lr": step.lr}] if host else []
    if routers and step.mode in LEARNING:
        groups.append({"params": routers, "lr": step.router_lr})
    return groups


def layer_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """All but the embeddings of the tokens, the head that scores them, and routers."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    others = [*ends, *(ffn.router for ffn in expert_ffns(model))]
    left_out = {id(p) for other in others if other is not None for p in other.parameters()}
    return [p for p in model.parameters() if id(p) not in left_out]


def _ffn_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the FFNs compute with, each tensor once; no router."""
    routed = expert_ffns(model)
    if not routed:
        parts = [ffn.part(path) for ffn in unfused_ffns(model) for path in ffn.layout.parts()]
        return list({id(p): p for part in parts for p in part.parameters()}.values())
    routers = {id(p) for ffn in routed for p in ffn.router.parameters()}
    return [p for ffn in routed for p in ffn.parameters() if id(p) not in routers]


@contextmanager
def only_trainable(model: nn.Module, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Gradients only where something is trained; every flag is put back, by name."""
    wanted = {id(p) for group in groups for p in group["params"]}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for param in model.parameters():
        param.requires_grad_(id(param) in wanted)
    try:
        yield
    finally:
        for name, flag in flags.items():
            model.get_parameter(name).requires_grad_(flag)
