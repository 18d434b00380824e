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
from moe_tools.export.plan import FFNOutput, Written
from moe_tools.export.stock_experts import NAME, StockExperts


class GGUFReplay(Written):
    """The host's class with the tensors of the file, and with its experts, if it has any."""

    def __init__(
        self, tensors: Mapping[str, Tensor], config: Any, experts: StockExperts | None
    ) -> None:
        config = copy.deepcopy(config)
        write_block(config, None)
        state = dict(tensors)
        if config.tie_word_embeddings and "lm_head.weight" not in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        config.tie_word_embeddings = False
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if experts is not None:
            for layer, module in enumerate(self.model.model.layers):
                module.mlp = ReplayedExperts(experts, _taken(state, NAME.format(layer)))
        self.model.load_state_dict(state)

    @torch.no_grad()
    def ffn(self, layer: int, x_TD: Tensor, residual_TD: Tensor) -> FFNOutput:
        """The experts of a layer."""
        ffn = cast(ReplayedExperts, self.model.model.layers[layer].mlp)
        return FFNOutput(ffn(x_TD), ffn.weights_TR(x_TD) > 0)

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV."""
        logits_BTV: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV


class ReplayedExperts(nn.Module):
    """The experts of one layer of a `glm4moe`; its tensors stay out of the state dict."""

    def __init__(self, experts: StockExperts, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.experts = experts
        self.choice_RD, self.bias_R = tensors["gate.weight"], tensors["gate.bias"]
        self.gate_FD, self.up_FD, down_FD = (
            torch.cat([_neurons(part, tensors[f"{kind}.{part}"]) for kind in GROUPS])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        self.down_DF = down_FD.T

    def weights_TR(self, x_TD: Tensor) -> Tensor:
        """What the routed experts are multiplied by; 0: not chosen."""
        scores_TR = nn.functional.linear(x_TD, self.choice_RD)
        if self.experts.weights == "sigmoid":
            scores_TR = scores_TR.sigmoid()
        chosen_TK = (scores_TR + self.bias_R).topk(self.experts.k).indices
        weights_TK = scores_TR.gather(-1, chosen_TK)
        if self.experts.weights == "sigmoid":
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        else:
            weights_TK = weights_TK.softmax(-1)
        return torch.zeros_like(scores_TR).scatter(-1, chosen_TK, weights_TK * self.experts.k)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD; all neurons are computed, and those that are not chosen weighed by 0."""
        weight_TF = self.weights_TR(x_TD).repeat_interleave(self.experts.size, dim=-1)
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
