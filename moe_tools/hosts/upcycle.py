"""Sparse upcycling: a dense model as a Mixtral whose experts all start as its FFN.

Komatsuzaki et al., arXiv 2212.05055. There the result is trained, so that the experts part ways; as
it is, it is an MoE host of any size that computes what a dense model computes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.hosts.fused import fused_experts
from moe_tools.hosts.moe_host import fill_experts

DONORS = (LlamaForCausalLM, MistralForCausalLM)
"""Classes that compute what Mixtral does, but for its experts."""


@torch.no_grad()
def upcycle(
    donor: PreTrainedModel,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    noise: float = 0.0,
) -> MixtralForCausalLM:
    """A Mixtral whose experts are copies of the donor's FFNs and whose routers are random.

    Mixtral's routers weigh the experts they choose by numbers that sum to 1, so without noise it
    computes what the donor computes, up to rounding, whatever its routers say. The donor stays as
    it is, and shares no memory with the result.

    Args:
        donor: a dense llama or mistral without biases.
        num_experts: experts of each layer.
        top_k: how many of them a token passes.
        seed: of the routers and the noise.
        noise: makes the experts differ from the start: standard deviation of what is added to each
            weight, over that of the weights of its matrix.

    Raises:
        ValueError: another class, biases or an activation that Mixtral cannot have, a routed
            donor, `top_k` outside 1 to `num_experts`, or noise below 0.
    """
    check_upcycling(num_experts, top_k, noise)
    ffns = _checked_ffns(donor)
    config = _config(donor, num_local_experts=num_experts, num_experts_per_tok=top_k)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=donor.dtype)
        for ffn, experts in zip(ffns, fused_experts(model).values(), strict=True):
            fill_experts(experts, ffn.weights())
            _add_noise(experts, noise)
    inside = tuple(f"{ffn.name}." for ffn in ffns)
    for name, parameter in donor.named_parameters():
        if not name.startswith(inside):
            model.get_parameter(name).copy_(parameter)
    model.generation_config = copy.deepcopy(donor.generation_config)
    return model.to(donor.device).eval()


def check_upcycling(num_experts: int, top_k: int, noise: float = 0.0) -> None:
    """The rules that no donor is needed for.

    Raises:
        ValueError: as `upcycle`.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, but must be between 1 and the {num_experts} experts")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}, but must be a number of 0 or more")


def _add_noise(experts: nn.Module, noise: float) -> None:
    if noise:
        for matrices in experts.parameters(recurse=False):
            for matrix in matrices:  # one expert at a time: little memory beside the model
                matrix.add_(noise * matrix.float().std() * torch.randn_like(matrix))


def _checked_ffns(donor: PreTrainedModel) -> list[FFN]:
    """The donor's FFNs, if a Mixtral can compute what it computes."""
    name = type(donor).__name__
    if not isinstance(donor, DONORS):
        known = ", ".join(kind.__name__ for kind in DONORS)
        raise ValueError(f"{name} cannot be upcycled: give one of {known}")
    ffns = find_ffns(donor)
    for parameter, _ in donor.named_parameters():
        if parameter.endswith(".bias"):
            raise ValueError(f"{name} has {parameter}, but Mixtral has no biases: take another one")
    if donor.config.hidden_act not in ACT2FN:
        raise ValueError(
            f"{name} has the activation {donor.config.hidden_act!r}, which transformers "
            "lacks: upcycle first, then `swap`"
        )
    return ffns


def _config(donor: PreTrainedModel, **experts: Any) -> MixtralConfig:
    """All that the two configs have in common, and the experts."""
    common = {one.name for one in fields(donor.config)} & {
        one.name for one in fields(MixtralConfig)
    }
    shared = {name: getattr(donor.config, name) for name in common - {"architectures"}}
    shared["tie_word_embeddings"] = _is_tied(donor)
    return MixtralConfig(**copy.deepcopy(shared), **experts)


def _is_tied(donor: PreTrainedModel) -> bool:
    """Whether the head is the embedding.

    The config may say so of a checkpoint that holds two different ones; transformers keeps both.
    """
    return donor.get_output_embeddings().weight is donor.get_input_embeddings().weight
