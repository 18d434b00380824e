"""A tiny random model of every family, and the few things each family test does with one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.routers import BottleneckRouter
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import host_state_dict

NEURONS = 48
EXPERT_SIZE = 8
EXPERTS = NEURONS // EXPERT_SIZE
UNEVEN = 10
"""An expert size that does not divide the neurons."""
SIZES = {EXPERT_SIZE: (8, 8, 8, 8, 8, 8), UNEVEN: (10, 10, 10, 9, 9)}
"""Expert size -> neurons of each expert."""
every_size = pytest.mark.parametrize("size", SIZES)
THRESHOLD = Conversion("donor", EXPERT_SIZE, "sigmoid", {"kind": "threshold", "tau": 0.5})
SPLIT = Conversion("donor", EXPERT_SIZE)
"""What a split leaves: reordered neurons, no router yet."""
ALWAYS = 100.0
"""A router bias whose score is exactly 1 in fp32."""


@dataclass(frozen=True)
class Family:
    """A stock class, its configuration and the arguments that are not in the configuration."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    sizes: dict[str, Any]
    stock: dict[str, Any] = field(default_factory=dict)
    """How the stock class is built, where its default is not the plain computation."""


_BODY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GROUPED = _BODY | {"num_key_value_heads": 1}
_GEMMA = _GROUPED | {"head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = _GROUPED | _MOE | {"moe_intermediate_size": NEURONS, "mlp_only_layers": [0]}
_EAGER = {"experts_implementation": "eager"}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": NEURONS}
_BEAM = _GEMMA | _ROUTED | {"num_experts": 4, "n_group": 1, "topk_group": 1}
_NEMOTRON_H = _GEMMA | _ROUTED | {"n_routed_experts": 4}
_NEMOTRON_H |= {"moe_shared_expert_intermediate_size": NEURONS}
_INKLING = _GEMMA | _ROUTED | {"n_routed_experts": 4, "d_rel": 4, "rel_extent": 16}
_INKLING |= {"swa_head_dim": 8, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1}
_LLAMA4 = _GEMMA | {"intermediate_size_mlp": NEURONS, "interleave_moe_layer_step": 1}
_LONGCAT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "ffn_hidden_size": NEURONS,
    "expert_ffn_hidden_size": NEURONS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 3,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
}
_GPT2 = {"vocab_size": 64, "n_embd": 16, "n_inner": NEURONS, "n_layer": 2, "n_head": 2}
_OPT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": NEURONS,
    "num_layers": 2,
    "num_heads": 2,
    "initializer_factor": 0.5,  # with 1 its logits, and so their rounding, are twice the others'
}

FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM, LlamaConfig, _BODY | {"mlp_bias": True}),
    "mistral": Family(MistralForCausalLM, MistralConfig, _GROUPED),
    "qwen2": Family(Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen3": Family(Qwen3ForCausalLM, Qwen3Config, _GEMMA),
    "gemma": Family(GemmaForCausalLM, GemmaConfig, _GEMMA),
    "gemma2": Family(Gemma2ForCausalLM, Gemma2Config, _GEMMA),
    "gemma3": Family(Gemma3ForCausalLM, Gemma3TextConfig, _GEMMA),
    "phi3": Family(Phi3ForCausalLM, Phi3Config, _GROUPED | {"pad_token_id": 0}),
    "gpt2": Family(GPT2LMHeadModel, GPT2Config, _GPT2),
    "opt": Family(OPTForCausalLM, OPTConfig, _OPT),
    "gpt_neox": Family(GPTNeoXForCausalLM, GPTNeoXConfig, _BODY),
    "bert": Family(BertForMaskedLM, BertConfig, _BODY),
    "roberta": Family(RobertaForMaskedLM, RobertaConfig, _BODY | {"max_position_embeddings": 80}),
    "t5-relu": Family(T5ForConditionalGeneration, T5Config, _T5 | {"feed_forward_proj": "relu"}),
    "t5-gated": Family(
        T5ForConditionalGeneration, T5Config, _T5 | {"feed_forward_proj": "gated-gelu"}
    ),
    "mixtral": Family(
        MixtralForCausalLM,
        MixtralConfig,
        _GROUPED | {"num_local_experts": 4},
        stock=_EAGER,
    ),
    "qwen2_moe": Family(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        _QWEN_MOE | {"shared_expert_intermediate_size": NEURONS},
        stock=_EAGER,
    ),
    "qwen3_moe": Family(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, _QWEN_MOE | {"head_dim": 8}, stock=_EAGER
    ),
    "olmoe": Family(
        OlmoeForCausalLM, OlmoeConfig, _GROUPED | _MOE | {"eos_token_id": 2}, stock=_EAGER
    ),
}


def _later(model: str, config: str, sizes: dict[str, Any]) -> Family | None:
    """A family with experts that began after the lowest transformers; None: not yet there."""
    if not hasattr(transformers, f"{model}ForCausalLM"):
        return None
    kinds = (
        getattr(transformers, f"{name}") for name in (f"{model}ForCausalLM", f"{config}Config")
    )
    return Family(*kinds, sizes, stock=_EAGER)


_FUSED: dict[str, Family | None] = {
    # transposed, gate and up rows alternate, biases, limits and an offset
    "gpt_oss": Family(
        GptOssForCausalLM,
        GptOssConfig,
        _GEMMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "eos_token_id": None},
        stock=_EAGER,
    ),
    # no gate
    "nemotron_h": Family(
        NemotronHForCausalLM,
        NemotronHConfig,
        _NEMOTRON_H | {"layers_block_type": ["attention", "moe", "moe"]},
        stock=_EAGER,
    ),
    # a gate of its own, concatenated
    "beam": _later("Beam", "Beam", _BEAM | {"mlp_layer_types": ["sparse"] * 2}),
    # shared experts fused as well
    "inkling": _later("Inkling", "InklingText", _INKLING),
    # every expert is called with every token
    "llama4": Family(
        Llama4ForCausalLM,
        Llama4TextConfig,
        _LLAMA4 | {"num_local_experts": 4, "num_experts_per_tok": 2},
        stock=_EAGER,
    ),
    # experts that hand their tokens through
    "longcat": Family(LongcatFlashForCausalLM, LongcatFlashConfig, _LONGCAT, stock=_EAGER),
}
FUSED = {name: family for name, family in _FUSED.items() if family is not None}
"""Families with other experts than the rest, each in its own way; their hosts are unusual, too."""
TABLE = FAMILIES | FUSED
"""What the exactness table runs over."""
MOE = [name for name, family in FAMILIES.items() if family.stock]
"""Families with experts of their own, the stock class running them one by one. Our MoE kernels
compute these, and they can be given another activation."""
UNFLAGGED = ("llama4", "longcat")
"""Families whose experts transformers can run in one way alone."""
ROUNDED = ("gpt_oss", "inkling")
"""Families that add biases, or sum the experts' outputs, in an operation of their own: what we
compute in one is rounded once instead of twice."""
UNGATED = ("gpt2", "opt", "gpt_neox", "bert", "roberta", "t5-relu")
"""Families whose FFNs have no gate."""


def build(name: str, *, dropout: float = 0.0, **config: Any) -> PreTrainedModel:
    """A dense model in eval mode with noise on every parameter: no bias stays zero."""
    family = TABLE[name]
    settings = family.config(**family.sizes | config)
    for key, value in settings.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(settings, key, dropout)
    model = family.model._from_config(settings, **family.stock).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def model_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows of nine tokens, the same for every model; an encoder-decoder gets them twice."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 9), generator=draw, device="cpu").to(model.device)
    inputs = {"input_ids": ids}
    return inputs | {"decoder_input_ids": ids} if model.config.is_encoder_decoder else inputs


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**model_inputs(model)).logits


def same(family: str, one: Tensor, other: Tensor) -> bool:
    """Whether two results are equal to the last bit; where the host rounds otherwise, to 1e-6."""
    if family in ROUNDED:
        return bool((one - other).abs().max() <= 1e-6 * max(1.0, float(other.abs().max())))
    return torch.equal(one, other)


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in fresh memory. Loaded weights lie in the file wherever they start, and BLAS rounds
    a product of few rows by where its operands start: Mixtral's logits move by 1e-7."""
    return copy.deepcopy(model)


def stock(name: str, folder: Path) -> PreTrainedModel:
    """The folder, loaded by the stock class, as without moe-tools."""
    family = TABLE[name]
    return aligned(load_stock(family.model, folder, **family.stock))


def load_stock(model: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    """`from_pretrained` as it is without moe-tools."""
    with transformers_patched(False):
        return model.from_pretrained(folder, **options)


def said(model: PreTrainedModel) -> Conversion:
    """What a model's config says was asked for: all but where its FFNs were found."""
    conversion = read_conversion(model)
    assert conversion is not None and conversion.layouts is not None
    return replace(conversion, layouts=None)


def per_neuron(value_TE: Tensor, size: int = EXPERT_SIZE) -> Tensor:
    """Each expert's value, once for each of its neurons."""
    return value_TE.repeat_interleave(torch.tensor(SIZES[size]), dim=-1)


def of_size(size: int, conversion: Conversion = THRESHOLD) -> Conversion:
    """A conversion with experts of another size."""
    return replace(conversion, expert_size=size)


def routed(
    donor: PreTrainedModel, conversion: Conversion = THRESHOLD
) -> tuple[PreTrainedModel, list[ExpertFFN]]:
    """A converted copy of `donor`, every expert on, and its FFNs."""
    model = copy.deepcopy(donor)
    ffns = attach_experts(model, conversion)
    force_on(model)
    return model, ffns


@torch.no_grad()
def force_on(model: nn.Module) -> None:
    """Every score exactly 1, for every token."""
    for ffn in expert_ffns(model):
        ffn.router.weight.zero_()
        ffn.router.bias.fill_(ALWAYS)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Routers that turn about half of the experts off, another half for every token."""
    for ffn in expert_ffns(model):
        if isinstance(ffn.router, BottleneckRouter):
            nn.init.orthogonal_(ffn.router.first.weight)
        last = getattr(ffn.router, "second", ffn.router)
        last.weight.normal_()
        last.bias.normal_(std=0.1)


@torch.no_grad()
def sparsity(model: PreTrainedModel, blocks_BT: Tensor) -> float:
    """Share of the experts off, over tokens and FFNs."""
    with record_routing(model) as routings:
        model(input_ids=blocks_BT)
    off = sum(int((~routing.mask_TE).sum()) for routing in routings)
    return off / sum(routing.mask_TE.numel() for routing in routings)


def host_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under the host's names, without the routers'."""
    return {key: value for key, value in host_state_dict(model).items() if not is_router(key)}


def host_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients after a backward pass, under the host's names; zero where none arrived."""
    shadow = copy.deepcopy(model)
    for mine, original in zip(shadow.parameters(), model.parameters(), strict=True):
        mine.data = torch.zeros_like(mine) if original.grad is None else original.grad
    return host_tensors(shadow)


def is_router(key: str) -> bool:
    """Whether a tensor is one that moe-tools adds to the host's."""
    return ".router." in key or key.endswith((".off_F", ".bias_D", ".off_RD"))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model folder, sharded or not."""
    shapes = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes
