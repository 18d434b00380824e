"""Predicts the activations that a training pass keeps for its backward pass, from shapes alone.

After Korthikanti et al. (arXiv 2205.05198, section 4.1), one term a tensor that is kept, and as the
hosts of transformers compute today: attention that keeps no scores (sdpa), gated FFNs, key and
value heads that are fewer, norms in fp32. Bytes of one token, w bytes a number:

    attention   w (D + 2 A + 2 K)     its input; queries and output, of A; keys and values, of K
    norm        w D, an RMSNorm and 4 D more, in fp32
    FFN         w D + what its activation and products keep, at most w F each
    chosen      w D beside, of an MoE host's expert: what its output is weighed by
    switched    2 w F in mode soft, straight or weighted, F in hard; the router's input and scores
    dropout     2 D

Letters: D width of the model, F neurons of an FFN, E experts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.hosts.moe_host import chosen_share
from moe_tools.hosts.projections import Projections, hidden_TF
from moe_tools.measure.flops import attending, contexts

FP32 = 4
"""Bytes."""
SCORES = 3
"""fp32 numbers a token keeps of an expert: its score, and what losses or weights make of it."""
DROPOUTS = (
    "resid_pdrop",
    "hidden_dropout_prob",
    "dropout_rate",
    "residual_dropout",
    "hidden_dropout",
)
"""Fields of a config that say how many numbers between layers are dropped."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one token of one pass."""

    layers: int
    """How many."""
    input: float
    """Of what enters one layer."""
    inside: float
    """Of what all layers keep."""
    hidden: float
    """Of h of all FFNs: part of `inside`, kept by a loss on h even where layers are recomputed."""
    scores: float
    """Of the routers' scores, as `hidden`."""
    around: float
    """Before and behind the layers."""

    def per_token(self, *, recomputed: bool = False, watched: Collection[str] = ()) -> float:
        """What a token keeps until the backward pass has used it.

        Args:
            recomputed: the layers are computed again in the backward pass, one at a time.
            watched: what losses look at inside FFNs: `hidden`, `pre`, `outputs`.
        """
        seen = self.hidden if "pre" in watched else 0.0
        if "outputs" in watched:  # of both models, and their difference
            seen += 3 * self.input * self.layers
        if not recomputed:
            return self.inside + self.around + seen
        if "hidden" in watched:
            seen += self.hidden
        one_layer = self.inside / max(1, self.layers)
        return self.input * self.layers + one_layer + self.scores + self.around + seen

    @classmethod
    def of(cls, model: PreTrainedModel, length: int, mode: str) -> Activations:
        """Those of a model, maybe empty, in blocks of `length`, its experts switched by `mode`."""
        config = attending(model)
        each = next(model.parameters()).element_size()
        width: int = config.hidden_size
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or width // heads
        keys = heads if model.config.is_encoder_decoder else _key_heads(config, heads)
        layers = len(contexts(model, length))
        attention = each * (width + 2 * heads * head + 2 * keys * head) + FP32 * heads
        if getattr(config, "_attn_implementation", "sdpa") == "eager":
            attention += heads * length * (each + FP32)
        masks = 2 * width if any(getattr(config, name, 0.0) for name in DROPOUTS) else 0
        norms = sum(_norm(module, width, each) for module in model.modules())
        ffns: Sequence[FFN | ExpertFFN] = expert_ffns(model) or find_ffns(model)
        shared = [(chosen_share(model, ffn.name), ffn) for ffn in ffns]
        kept = sum(share * _ffn(ffn, each, mode) for share, ffn in shared)
        kept += sum(share * each * width for share, _ in shared if share < 1)
        hidden = sum(share * each * ffn.projections.size[0] for share, ffn in shared)
        scores = sum(share * _scores(ffn) for share, ffn in shared)
        inside = layers * (attention + masks) + norms + kept + scores
        return cls(layers, each * width, inside, hidden, scores, each * width)


def _key_heads(config: Any, heads: int) -> int:
    return getattr(config, "num_key_value_heads", None) or heads


def _norm(module: nn.Module, width: int, each: int) -> int:
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or not isinstance(weight, Tensor):
        return 0
    if weight.numel() != width:
        return 0
    return each * width if isinstance(module, nn.LayerNorm) else (each + FP32) * width


def _ffn(ffn: FFN | ExpertFFN, each: int, mode: str) -> float:
    neurons, width = ffn.projections.size
    kept = each * width + neurons * _each_neuron(ffn.projections, each)
    if not isinstance(ffn, ExpertFFN):
        return kept
    return kept + neurons * {"hard": 1, "weighted": 2 * each + 1}.get(mode, 2 * each)


def _scores(ffn: FFN | ExpertFFN) -> int:
    if not isinstance(ffn, ExpertFFN):
        return 0
    return FP32 * (ffn.projections.size[1] + SCORES * ffn.division.num_experts)


def _each_neuron(parts: Projections, each: int) -> float:
    """Bytes a token keeps of one neuron: tried on a few numbers, as activations differ.

    ReLU keeps what it gives, SiLU what it gets, a GELU that is written out five tensors.
    """
    tensors = [*parts.act.parameters(), *parts.act.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return each * (2 if parts.gate is None else 4)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    dtype = torch.bfloat16 if each == 2 else torch.float32
    up_TF, gate_TF = (torch.ones(1, NEURONS, dtype=dtype).requires_grad_() for _ in range(2))
    with torch.device("cpu"), saved_tensors_hooks(keep, lambda tensor: tensor):
        h_TF = hidden_TF(parts.act, up_TF, None if parts.gate is None else gate_TF)
    keep(h_TF)  # the way down needs it
    large = (tensor for tensor in kept.values() if tensor.numel() == NEURONS)
    return sum(tensor.element_size() for tensor in large)


NEURONS = 8
"""On how many it is tried."""
LOSS_ROWS = 128
"""Tokens whose logits are in fp32 at once (`moe_tools.training.logit_losses`)."""


def logits_bytes(model: PreTrainedModel, tokens: int, *, taught: bool) -> int:
    """Bytes of the logits of one pass: themselves, their gradient, a teacher's, a few fp32 rows.

    A classifier's are next to nothing.
    """
    head = model.get_output_embeddings()
    if head is None:
        return 0
    vocabulary, each = head.weight.shape[0], head.weight.element_size()
    rows = min(LOSS_ROWS, tokens) * (4 if taught else 2) * FP32
    return int(vocabulary * (tokens * each * (2 + taught) + rows))
