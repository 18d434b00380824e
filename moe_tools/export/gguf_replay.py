"""A GGUF file computed in PyTorch by llama.cpp's formulas: what the check of an export runs.

Letters: B blocks, T tokens, D width of the model, F neurons, E experts, R experts that are routed,
N neurons of one expert, K chosen experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_tools.experts.conversion import write_block
from moe_tools.export.gguf_file import ReadTensors
from moe_tools.export.llamas import logits_of
from moe_tools.export.plan import FFNOutput, Written
from moe_tools.export.stock_experts import NAME, StockExperts

CONFIG = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "context_length": "max_position_embeddings",
}
"""Key of a file, without the architecture -> what a config calls it."""
SIGMOID = 2
"""llama.cpp's gating function of it."""


class GGUFReplay(Written):
    """The host's class with the tensors and numbers of the file, and its experts, if it has any.

    Args:
        tensors: of the file.
        config: of the source; what a file says too, is taken from the file.
        experts: whether there are any.
    """

    def __init__(self, tensors: ReadTensors, config: Any, experts: StockExperts | None) -> None:
        config = copy.deepcopy(config)
        write_block(config, None)
        for key, name in CONFIG.items():
            setattr(config, name, tensors.metadata[key])
        config.rope_parameters["rope_theta"] = tensors.metadata["rope.freq_base"]
        state = dict(tensors)
        if config.tie_word_embeddings and "lm_head.weight" not in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        config.tie_word_embeddings = False
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if experts is not None:
            for layer, module in enumerate(self.model.model.layers):
                taken = _taken(state, NAME.format(layer))
                module.mlp = ReplayedExperts(taken, tensors.metadata)
        self.model.load_state_dict(state, assign=True)

    @torch.no_grad()
    def ffn(self, layer: int, x_TD: Tensor, residual_TD: Tensor) -> FFNOutput:
        """The experts of a layer."""
        ffn = cast(ReplayedExperts, self.model.model.layers[layer].mlp)
        return FFNOutput(ffn(x_TD), ffn.weights_TR(x_TD) > 0)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV."""
        return logits_of(self.model, ids_BT)


class ReplayedExperts(nn.Module):
    """The experts of one layer of a `glm4moe`; its tensors stay out of the state dict."""

    def __init__(self, tensors: dict[str, Tensor], said: Mapping[str, Any]) -> None:
        super().__init__()
        self.k, self.scale = int(said["expert_used_count"]), float(said["expert_weights_scale"])
        self.size = int(said["expert_feed_forward_length"])
        self.sigmoid = said["expert_gating_func"] == SIGMOID
        self.choice_RD, self.bias_R = tensors["gate.weight"], tensors["gate.bias"]
        self.gate_FD, self.up_FD, down_FD = (
            torch.cat([_neurons(part, tensors[f"{kind}.{part}"]) for kind in GROUPS])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        self.down_DF = down_FD.T

    def weights_TR(self, x_TD: Tensor) -> Tensor:
        """What the routed experts are multiplied by; 0: not chosen."""
        scores_TR = nn.functional.linear(x_TD, self.choice_RD)
        if self.sigmoid:
            scores_TR = scores_TR.sigmoid()
        chosen_TK = (scores_TR + self.bias_R).topk(self.k).indices
        weights_TK = scores_TR.gather(-1, chosen_TK)
        if self.sigmoid:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        else:
            weights_TK = weights_TK.softmax(-1)
        return torch.zeros_like(scores_TR).scatter(-1, chosen_TK, weights_TK * self.scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD; all neurons are computed, and those that are not chosen weighed by 0."""
        weight_TF = self.weights_TR(x_TD).repeat_interleave(self.size, dim=-1)
        always = len(self.gate_FD) - weight_TF.shape[-1]
        weight_TF = nn.functional.pad(weight_TF, (always, 0), value=1.0)
        gate_TF = nn.functional.linear(x_TD, self.gate_FD)
        h_TF = nn.functional.silu(gate_TF) * nn.functional.linear(x_TD, self.up_FD)
        return nn.functional.linear(h_TF * weight_TF, self.down_DF)


GROUPS = ("shared_experts", "experts")
"""Shared experts stand first."""


def _neurons(part: str, tensor: Tensor) -> Tensor:
    """A neuron a row, of experts that are stacked or end to end."""
    rows = tensor.mT if part == "down_proj" else tensor
    return rows.reshape(-1, rows.shape[-1])


def _taken(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Takes the tensors below a name out of a state dict."""
    names = [key for key in state if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}."): state.pop(key) for key in names}
