"""A folder of a stock MoE, which transformers and vLLM run: GLM4-MoE, or Mixtral.

GLM4-MoE has all that our experts need: a bias that counts for the choice alone, shared experts, a
factor after the weights, and the attention of a llama, with biases (Qwen2) and norms (Qwen3) where
they are. Mixtral has none of these, and more programs know it: it is written of routers without
bias and without shared experts.

Letters: D model width, F neurons, N neurons of one expert, R experts that are routed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, MixtralConfig

from moe_tools.checkpoint.loading import load
from moe_tools.export.folder import cast, write_around
from moe_tools.export.llamas import heads_of
from moe_tools.export.plan import Limits, Options, Plan, Written
from moe_tools.export.shards import Group, write_shards
from moe_tools.export.source import Source, StoredTensors
from moe_tools.export.stock import StockModel
from moe_tools.export.stock_experts import StockExperts, plan_experts, sets_alike

SCALE = 2.0**-11
"""Of scores whose weights shall be equal. 2^-10 to 2^-12 are best where the choice is made after
softmax or sigmoid, see `moe_tools.export.stock_experts` and docs/serving.md."""
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

Architecture = Literal["glm4_moe", "mixtral"]


@dataclass(frozen=True)
class MoEPlan(Plan):
    """A stock MoE folder."""

    compared = True

    config: Any
    experts: StockExperts
    architecture: Architecture
    dtype: torch.dtype | None
    tied: bool
    """The embedding of the source is its head, too."""

    @property
    def routed(self) -> bool:
        return True

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return self.dtype

    @property
    def limits(self) -> Limits | None:
        """Measured on SmolLM2: errors of 0.9e-3 to 1.3e-3, 98.6 to 99.9 % of sets.

        Mixtral's factor k is in its weights, which bf16 rounds once more unless it is a power of 2.
        """
        error = 4e-3 if self.architecture == "mixtral" else 2e-3
        return Limits(error, sets_alike(self.experts))

    def facts(self) -> dict[str, Any]:
        """The architecture and its experts."""
        return {"folder": self.architecture, **self.experts.facts()}

    def write(self, source: Source, place: Path) -> None:
        """Writes layer by layer."""
        load(source.name, device="meta")  # refuses what is incomplete
        write_shards(place, list(self._groups(source.tensors())))
        write_around(source, self.config, None, self.dtype, place)

    def read_back(self, place: Path, dtype: torch.dtype) -> Written | None:
        """The stock class."""
        return StockModel(place, dtype)

    def _groups(self, stored: StoredTensors) -> Iterator[Group]:
        yield partial(self._outside, stored, EMBEDDING)
        for layer in range(self.config.num_hidden_layers):
            yield partial(self._layer, stored, layer)
        yield partial(self._outside, stored, NORM)
        if not self.config.tie_word_embeddings:
            yield partial(self._outside, stored, HEAD)

    def _outside(self, stored: StoredTensors, name: str) -> dict[str, Tensor]:
        held = EMBEDDING if name == HEAD and self.tied else name
        return {name: cast(stored[held], self.dtype)}

    def _layer(self, stored: StoredTensors, layer: int) -> dict[str, Tensor]:
        """Attention and norms as they are, experts cut out."""
        prefix = f"model.layers.{layer}."
        kept = {
            name: cast(stored[name], self.dtype)
            for name in stored
            if name.startswith(prefix) and not name.startswith(f"{prefix}mlp.")
        }
        if self.architecture == "mixtral":
            return kept | self._mixtral(stored, layer, f"{prefix}block_sparse_moe.")
        return kept | self._glm4(stored, layer, f"{prefix}mlp.")

    def _glm4(self, stored: StoredTensors, layer: int, prefix: str) -> dict[str, Tensor]:
        """Choice by sigmoid(z) + bias, weights sigmoid(z) / sum, times `routed_scaling_factor`."""
        experts, (weight_RD, bias_R) = self.experts, self.experts.scores(stored, layer)
        equal = experts.weights == "equal"
        if bias_R is None:
            bias_R = weight_RD.new_zeros(experts.routed)
        made = {
            f"{prefix}gate.weight": weight_RD * SCALE if equal else weight_RD,
            # sigmoid(u) is 1/2 + u/4 for small u
            f"{prefix}gate.e_score_correction_bias": bias_R * SCALE / 4,
        }
        for part, rows_END in self._rows(stored, layer).items():
            shared_FD = rows_END[: experts.shared].flatten(0, 1)
            if not experts.shared:  # none would be computed otherwise by some programs
                shared_FD = torch.zeros_like(rows_END[0])
            made[f"{prefix}shared_experts.{part}.weight"] = _turned(part, shared_FD)
            for number, rows_ND in enumerate(rows_END[experts.shared :]):
                made[f"{prefix}experts.{number}.{part}.weight"] = _turned(part, rows_ND)
        return made

    def _mixtral(self, stored: StoredTensors, layer: int, prefix: str) -> dict[str, Tensor]:
        """Weights are softmax of the scores, over the chosen; the factor k is in w2."""
        weight_RD, _ = self.experts.scores(stored, layer)
        equal = self.experts.weights == "equal"
        made = {f"{prefix}gate.weight": weight_RD * SCALE if equal else weight_RD}
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for part, rows_END in self._rows(stored, layer).items():
            factor = self.experts.k if part == "down_proj" else 1
            for number, rows_ND in enumerate(rows_END):
                name = f"{prefix}experts.{number}.{names[part]}.weight"
                made[name] = _turned(part, rows_ND * factor)
        return made

    def _rows(self, stored: StoredTensors, layer: int) -> dict[str, Tensor]:
        """Name of a projection -> its neurons by experts, E x N x D."""
        name = f"model.layers.{layer}.mlp."
        return {
            part: self.experts.rows_END(
                _turned(part, cast(stored[f"{name}{part}.weight"], self.dtype))
            )
            for part in ("gate_proj", "up_proj", "down_proj")
        }


def plan_moe(source: Source, options: Options) -> Plan:
    """Plans the stock MoE folder.

    Raises:
        ValueError: what no stock MoE can say, see `plan_experts`.
    """
    options.only("moe", "dtype", "top_k")
    experts = plan_experts(source, options.top_k, "moe")
    plain = source.config.model_type in ("llama", "mistral") and not experts.shared
    if experts.weights == "softmax" and not plain:
        raise ValueError(
            f"moe: {source.name} weighs its experts by softmax, as Mixtral does, which has no "
            "shared experts, and no biases or norms in its attention: convert a llama or mistral "
            "with `shared_experts: 0`, or attach router sigmoid with `router_options: {bias: "
            "false}`"
        )
    tied = bool(source.config.tie_word_embeddings)
    if plain and not experts.has_bias and experts.weights != "sigmoid":
        config = _mixtral(source.config, experts)
        return MoEPlan(config, experts, "mixtral", options.dtype, tied)
    return MoEPlan(_glm4(source.config, experts), experts, "glm4_moe", options.dtype, tied)


def _glm4(config: Any, experts: StockExperts) -> Any:
    made: Any = Glm4MoeConfig(
        **_common(config),
        architectures=["Glm4MoeForCausalLM"],
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
        intermediate_size=config.intermediate_size,
        attention_bias=config.model_type == "qwen2",
        use_qk_norm=config.model_type == "qwen3",
        tie_word_embeddings=False,  # vLLM's class never ties
        moe_intermediate_size=experts.size,
        n_routed_experts=experts.routed,
        n_shared_experts=max(1, experts.shared),  # llama.cpp adds silu(x) where there is none
        num_experts_per_tok=experts.k,
        routed_scaling_factor=float(experts.k),
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
    )
    made.num_nextn_predict_layers = 0
    return made


def _mixtral(config: Any, experts: StockExperts) -> MixtralConfig:
    return MixtralConfig(
        **_common(config),
        architectures=["MixtralForCausalLM"],
        rope_parameters=dict(config.rope_parameters),
        intermediate_size=experts.size,
        tie_word_embeddings=config.tie_word_embeddings,
        num_local_experts=experts.routed,
        num_experts_per_tok=experts.k,
        sliding_window=None,
        router_jitter_noise=0.0,
    )


def _common(config: Any) -> dict[str, Any]:
    """What both configs have from the host."""
    heads = heads_of(config)
    same = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
    )
    return {
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "head_dim": heads.width,
        "hidden_act": "silu",
        **{name: getattr(config, name, None) for name in same},
    }


def _turned(part: str, rows: Tensor) -> Tensor:
    """A neuron a row, of a projection as it is stored, and back: down has neurons as columns."""
    return rows.mT if part == "down_proj" else rows
