"""Predicted activations, against the tensors that autograd keeps on real models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.measure.activations import Activations, logits_bytes

LENGTH = 128
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4}
FEW: dict[str, Any] = {"num_key_value_heads": 1}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}


def build(kind: str, layers: int) -> PreTrainedModel:
    """A tiny model without dropout, whose masks a CPU keeps otherwise than a GPU."""
    sizes = SIZES | {"num_hidden_layers": layers}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=176))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, **FEW, intermediate_size=176))
    if kind == "gemma":
        config = GemmaConfig(**sizes, **FEW, intermediate_size=512, head_dim=16)
        return GemmaForCausalLM(config)
    if kind == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
        return MixtralForCausalLM(MixtralConfig(**sizes, **experts, intermediate_size=176))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**GPT2, **NO_DROPOUT, n_layer=layers))
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **none, intermediate_size=256)
    return BertForSequenceClassification(config)


def kept(model: PreTrainedModel) -> float:
    """Bytes a token that autograd keeps of a forward pass, weights left out."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    seen: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    options = {"use_cache": False} if model.can_generate() else {}
    torch.manual_seed(0)
    ids_BT = torch.randint(3, 64, (2, LENGTH))
    seeing = record_routing(model) if expert_ffns(model) else nullcontext()
    with saved_tensors_hooks(keep, lambda tensor: tensor), seeing:
        model(input_ids=ids_BT, **options)
    return sum(size for size, _ in seen.values()) / ids_BT.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma", "gpt2", "bert", "mixtral"])
def test_a_layer_keeps_what_is_predicted(kind: str, dtype: torch.dtype) -> None:
    models = [build(kind, layers).to(dtype).train() for layers in (1, 3)]  # type: ignore[arg-type]
    seen = [kept(model) for model in models]
    told = [Activations.of(model, LENGTH, "dense").per_token() for model in models]
    assert told[1] - told[0] == pytest.approx(seen[1] - seen[0], rel=0.05)
    assert told[1] == pytest.approx(seen[1], rel=0.06)


@pytest.mark.parametrize("mode", ["soft", "straight", "hard", "weighted"])
def test_switched_experts_keep_what_is_predicted(mode: Any) -> None:
    seen, told = [], []
    rule = {"kind": "topk", "k": 3} if mode == "weighted" else {"kind": "threshold", "tau": 0.5}
    for layers in (1, 3):
        model = build("llama", layers)
        attach_experts(model, Conversion("donor", 16, "sigmoid", rule))
        model.to(torch.bfloat16).train()  # type: ignore[arg-type]
        for ffn in expert_ffns(model):
            ffn.router.float()
        set_mode(model, mode)
        seen.append(kept(model))
        told.append(Activations.of(model, LENGTH, mode).per_token())
    assert told[1] - told[0] == pytest.approx(seen[1] - seen[0], rel=0.05)


def test_recomputed_layers_keep_their_input_and_what_losses_hold() -> None:
    found = Activations.of(build("llama", 8), LENGTH, "dense")
    again = found.per_token(recomputed=True)
    assert again == pytest.approx(8 * 4 * 64 + found.inside / 8 + found.around)
    watched = found.per_token(recomputed=True, watched={"hidden"})
    assert watched - again == 8 * 4 * 176  # h of every layer, in fp32
    assert found.per_token(watched={"hidden"}) == found.per_token()  # it is there in any case


def test_scores_that_are_kept_cost_the_square_of_the_length() -> None:
    model = build("llama", 2)
    fused = Activations.of(model, LENGTH, "dense").per_token()
    model.config._attn_implementation = "eager"
    assert Activations.of(model, LENGTH, "dense").per_token() - fused == 2 * 4 * LENGTH * 8


def test_logits_by_hand() -> None:
    model = build("llama", 1).to(torch.bfloat16)  # type: ignore[arg-type]
    assert logits_bytes(model, 1000, taught=False) == 64 * (2 * 2 * 1000 + 2 * 4 * 128)
    assert logits_bytes(model, 1000, taught=True) == 64 * (3 * 2 * 1000 + 4 * 4 * 128)
    assert logits_bytes(build("bert", 1), 1000, taught=False) == 0
