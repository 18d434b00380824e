"""Models for llama.cpp: dense llamas, and converted models as its `glm4moe`.

llama.cpp rotates neighbouring numbers of q and k of a llama where transformers rotates the halves
of a head, so that the rows of these two are written in another order; those of `glm4moe` stay.

In `glm4moe` the choice is made by the raw scores plus a bias, and the weights are the softmax of
the chosen scores (gating function 3), so that scores can be scaled down until their weights are
equal, and nothing is lost: see `moe_tools.export.stock_experts`.

Letters: T tokens, D width of the model, F neurons, E experts, R experts that are routed, N neurons
of one expert, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.checkpoint.loading import load
from moe_tools.experts.conversion import read_block
from moe_tools.export.gguf_file import (
    GROUP,
    WAY_OUT,
    FilePlan,
    Planned,
    ReadTensors,
    check_tokenizer,
    write_gguf,
)
from moe_tools.export.gguf_replay import SIGMOID, GGUFReplay
from moe_tools.export.llamas import about_rope, donor_file, heads_of
from moe_tools.export.plan import Kind, Limits, Options, Plan, Written
from moe_tools.export.source import Source
from moe_tools.export.stock_experts import NAME, StockExperts, plan_experts, sets_alike

logger = logging.getLogger(__name__)

HOSTS = ("llama", "mistral")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""Where a dense file has no head, the embedding is the head as well."""
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""transformers' names inside a layer -> llama.cpp's."""
DTYPES: dict[Kind, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}
"""What weights are rounded to."""
FEW_BITS: dict[Kind, tuple[float, float]] = {"q8_0": (0.05, 0.1), "q4_0": (0.5, 0.7)}
"""Errors of outputs that groups of few bits may make, and logarithms of perplexities: some times
what they were on random weights, which round the worst, and on SmolLM2."""
SCALE = 2.0**-20
"""Of scores whose weights shall be equal: exact, as the choice is made before."""
SOFTMAX_OF_CHOSEN = 3
"""llama.cpp's gating function of it."""
MOST_CHOSEN = 24
"""k of llama.cpp: its graph has room for 8 nodes a tensor, and a chosen expert takes 2 a layer.
Measured with glm4moe: 26 run, above that an assertion ends the process."""
MOST_EXPERTS = 1024


@dataclass(frozen=True)
class GGUFPlan(Plan):
    """A file for llama.cpp."""

    compared, is_file = True, True

    file: FilePlan
    config: Any
    experts: StockExperts | None
    """None: dense."""
    kind: Kind
    tokenizer: str | None

    @property
    def routed(self) -> bool:
        return self.experts is not None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.kind)

    @property
    def limits(self) -> Limits | None:
        """Routers are exact under every kind, so that the choice is, too."""
        sets = 0.0 if self.experts is None else sets_alike(self.experts)
        if self.kind in FEW_BITS:
            error, worse = FEW_BITS[self.kind]
            return Limits(error, sets, median=math.inf, worse=worse)
        return Limits(2e-3, sets)

    def facts(self) -> dict[str, Any]:
        """The architecture, its experts, and whose tokenizer it has."""
        experts = {} if self.experts is None else self.experts.facts()
        name = None if self.tokenizer is None else Path(self.tokenizer).name
        return {
            "file": self.file.architecture,
            "type": self.kind,
            "tokenizer": "none: it takes token ids" if name is None else name,
            **experts,
        }

    def write(self, source: Source, place: Path) -> None:
        """Writes tensor by tensor."""
        load(source.name, device="meta")  # refuses what is incomplete
        tensors: Mapping[str, Tensor] = source.tensors()
        if self.experts is not None:
            names, tied = tuple(self.file.tensors), bool(self.config.tie_word_embeddings)
            tensors = _ExpertTensors(tensors, self.experts, names, tied=tied)
        write_gguf(self.file, tensors, place, self.kind, self.tokenizer)

    def read_back(self, place: Path, dtype: torch.dtype) -> Written | None:
        """What the file computes, by llama.cpp's formulas in PyTorch; in fp32 alone."""
        if dtype != torch.float32:
            return None
        return GGUFReplay(ReadTensors(self.file, place), self.config, self.experts)


def plan_gguf(source: Source, options: Options) -> Plan:
    """Plans the file: of a routed folder as `glm4moe`, of a dense one as `llama`.

    Raises:
        ValueError: a model that llama.cpp would compute as another one, or not at all; a tokenizer
            of another model.
    """
    options.only("gguf", "type", "tokenizer", "top_k")
    conversion, kind = source.conversion, options.type or "f16"
    experts = None
    if conversion is not None and conversion.router is not None:
        experts = plan_experts(source, options.top_k, "gguf")
        _check_experts(source, experts, kind)
        file = _plan_experts(source.config, experts)
    else:
        if options.top_k is not None:
            raise ValueError(f"{source.name} has no routers: --top-k says nothing")
        file = plan(source.config)
        if conversion is not None and conversion.prompt_share is not None:
            logger.warning("%s selects by the prompt: in the file every neuron runs", source.name)
    tokenizer = options.tokenizer or donor_file(conversion)
    if tokenizer is not None:
        check_tokenizer(tokenizer, source.config.vocab_size)
    return GGUFPlan(file, source.config, experts, kind, tokenizer)


def plan(config: Any) -> FilePlan:
    """Plans the file of a dense model, by its config alone.

    Args:
        config: of the model; a routed one is planned as the dense model of the same weights.

    Raises:
        ValueError: a model that llama.cpp's `llama` would compute as another one, or not at all.
    """
    reason = _reason(config)
    if reason is not None:
        raise ValueError(f"GGUF is written of a plain llama, and {reason}: {WAY_OUT}")
    tensors = {
        "model.embed_tokens.weight": Planned(EMBEDDING, (config.vocab_size, config.hidden_size))
    }
    for number in range(config.num_hidden_layers):
        for theirs, name in LAYER.items():
            planned = Planned(f"blk.{number}.{name}.weight", *_inside(config, name))
            tensors[f"model.layers.{number}.{theirs}.weight"] = planned
    tied = bool(config.tie_word_embeddings)
    return FilePlan(
        tensors | _after(config, tied),
        frozenset({"lm_head.weight"} if tied else ()),
        _common(config),
    )


def _after(config: Any, tied: bool) -> dict[str, Planned]:
    """What follows the layers."""
    found = {"model.norm.weight": Planned("output_norm.weight", (config.hidden_size,))}
    if not tied:
        found["lm_head.weight"] = Planned(HEAD, (config.vocab_size, config.hidden_size))
    return found


def _common(config: Any) -> dict[str, int | float | bool]:
    """Keys of every architecture."""
    heads, groups, head = heads_of(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _reason(config: Any) -> str | None:
    """Returns why a dense model cannot be written; None when it can."""
    if config.model_type not in HOSTS:
        return f"this is a {config.model_type}"
    block = read_block(config)
    activation = config.hidden_act if block is None else block.activation or config.hidden_act
    if activation not in ("silu", "swish"):
        kind = activation["kind"] if isinstance(activation, dict) else activation
        return f"this one has the activation {kind}, where llama.cpp computes SiLU"
    if block is not None and block.thresholds:
        return "this one drops inputs of its linears"
    if getattr(config, "quantization_config", None) is not None:
        return "this one is quantised"
    for name in ("attention_bias", "mlp_bias", "sliding_window"):
        value = getattr(config, name, None)
        if value:
            return f"this one has {name} {value}"
    if (rope := about_rope(config)) is not None:
        return f"this one {rope}"
    (heads, _, head), width = heads_of(config), config.hidden_size
    if heads * head != width:
        return f"this one has {heads} heads of {head}, which is not its width of {width}"
    return None


def _inside(config: Any, name: str) -> tuple[tuple[int, ...], int]:
    """The shape of a tensor in a layer, and its heads if they are put in another order."""
    width, neurons = config.hidden_size, config.intermediate_size
    heads, groups, head = heads_of(config)
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "attn_q": ((heads * head, width), heads),
        "attn_k": ((groups * head, width), groups),
        "attn_v": ((groups * head, width), 0),
        "attn_output": ((width, heads * head), 0),
        "ffn_gate": ((neurons, width), 0),
        "ffn_up": ((neurons, width), 0),
        "ffn_down": ((width, neurons), 0),
    }
    return shapes.get(name, ((width,), 0))


def _check_experts(source: Source, experts: StockExperts, kind: Kind) -> None:
    """Checks what llama.cpp's `glm4moe` cannot do.

    Raises:
        ValueError: too many experts, or too many of a token, rope scaling, or experts that are no
            whole groups.
    """
    name = f"gguf: {source.name}"
    if experts.k > MOST_CHOSEN:
        raise ValueError(
            f"{name} runs {experts.k} routed experts a token, and llama.cpp ends its process above "
            f"{MOST_CHOSEN}: convert with larger experts, or shared ones, e.g. `--method stock_moe`"
        )
    if experts.routed > MOST_EXPERTS:
        raise ValueError(
            f"{name} has {experts.routed} experts, and llama.cpp takes {MOST_EXPERTS} at most: "
            "convert with larger experts"
        )
    if (rope := about_rope(source.config)) is not None:
        raise ValueError(f"{name} {rope}, which llama.cpp's glm4moe has not: export it `--to moe`")
    if kind in ("q8_0", "q4_0") and experts.size % GROUP:
        raise ValueError(
            f"{name} has experts of {experts.size} neurons, and {kind} stores whole groups of "
            f"{GROUP}: --type f16, or convert with an expert_size that is a multiple of {GROUP}"
        )


def _plan_experts(config: Any, experts: StockExperts) -> FilePlan:
    """Plans a `glm4moe`."""
    width, size, routed = config.hidden_size, experts.size, experts.routed
    heads, groups, head = heads_of(config)
    shared = max(1, experts.shared) * size  # without any, llama.cpp would add silu(x)
    inside = {
        "input_layernorm.weight": Planned("attn_norm.weight", (width,)),
        "post_attention_layernorm.weight": Planned("post_attention_norm.weight", (width,)),
        "self_attn.o_proj.weight": Planned("attn_output.weight", (width, heads * head)),
        "mlp.gate.weight": Planned("ffn_gate_inp.weight", (routed, width), exact=True),
        "mlp.gate.bias": Planned("exp_probs_b.bias", (routed,)),
    }
    for part, count in (("q", heads), ("k", groups), ("v", groups)):
        planned = Planned(f"attn_{part}.weight", (count * head, width))
        inside[f"self_attn.{part}_proj.weight"] = planned
        if config.model_type == "qwen2":
            bias = Planned(f"attn_{part}.bias", (count * head,))
            inside[f"self_attn.{part}_proj.bias"] = bias
    if config.model_type == "qwen3":
        for part in ("q", "k"):
            inside[f"self_attn.{part}_norm.weight"] = Planned(f"attn_{part}_norm.weight", (head,))
    for part in ("gate", "up", "down"):
        turned = part == "down"
        one = (width, size) if turned else (size, width)
        all_shared = (width, shared) if turned else (shared, width)
        inside[f"mlp.experts.{part}_proj"] = Planned(f"ffn_{part}_exps.weight", (routed, *one))
        inside[f"mlp.shared_experts.{part}_proj"] = Planned(f"ffn_{part}_shexp.weight", all_shared)
    tensors = {"model.embed_tokens.weight": Planned(EMBEDDING, (config.vocab_size, width))}
    for layer in range(config.num_hidden_layers):
        for name, planned in inside.items():
            there = replace(planned, name=f"blk.{layer}.{planned.name}")
            tensors[f"model.layers.{layer}.{name}"] = there
    metadata = {
        **_common(config),
        "attention.key_length": head,
        "attention.value_length": head,
        "expert_count": routed,
        "expert_used_count": experts.k,
        "expert_shared_count": max(1, experts.shared),
        "expert_feed_forward_length": size,
        "expert_gating_func": SIGMOID if experts.weights == "sigmoid" else SOFTMAX_OF_CHOSEN,
        "expert_weights_norm": True,
        "expert_weights_scale": float(experts.k),
        "leading_dense_block_count": 0,
        "nextn_predict_layers": 0,
    }
    return FilePlan(tensors | _after(config, tied=False), frozenset(), metadata, "glm4moe")


class _ExpertTensors(Mapping[str, Tensor]):
    """The tensors of a `glm4moe`, each made of those of a folder when it is asked for."""

    def __init__(
        self,
        stored: Mapping[str, Tensor],
        experts: StockExperts,
        names: tuple[str, ...],
        *,
        tied: bool,
    ) -> None:
        self.stored, self.experts, self.names, self.tied = stored, experts, names, tied

    def __getitem__(self, name: str) -> Tensor:
        if name == "lm_head.weight" and self.tied:
            return self.stored["model.embed_tokens.weight"]
        if name in self.stored:
            return self.stored[name]
        _, _, layer, _, group, part = name.split(".")[:6]
        if group == "gate":
            return self._choice(int(layer), part)
        return self._experts(int(layer), group, part)

    def _choice(self, layer: int, part: str) -> Tensor:
        """weight_RD or bias_R."""
        weight_RD, bias_R = self.experts.scores(self.stored, layer)
        scale = SCALE if self.experts.weights == "equal" else 1.0
        if part == "weight":
            return weight_RD * scale
        return weight_RD.new_zeros(len(weight_RD)) if bias_R is None else bias_R * scale

    def _experts(self, layer: int, group: str, part: str) -> Tensor:
        """Routed ones stacked, shared ones end to end."""
        rows = self.stored[f"{NAME.format(layer)}.{part}.weight"]
        turned = part == "down_proj"
        rows_END = self.experts.rows_END(rows.mT if turned else rows)
        shared = self.experts.shared
        if group == "experts":
            return rows_END[shared:].mT if turned else rows_END[shared:]
        rows_FD = rows_END[:shared].flatten(0, 1) if shared else torch.zeros_like(rows_END[0])
        return rows_FD.mT if turned else rows_FD

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
