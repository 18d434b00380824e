"""Counts the matrix FLOPs of one token where they happen.

A multiply and an add are two FLOPs. Counted: every weight matrix times the rows it is applied to
(the head of the vocabulary included, embedding lookups not), our routers, and the two products of
attention. Not counted: norms, softmax, activations, biases. What a router computes in whole numbers
of few bits is no FLOP, and stands beside them.

An FFN is charged for the neurons that are on. A constant in place of a neuron that is off
(`off: mean`) costs no matrix FLOPs: y = W (h - off) + W off, whose last term is a constant. The
constants of experts that are off (`refit`) are their sum less those of the experts that are on.

Letters: T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.data.limits import text_config
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import valid_tokens
from moe_tools.hosts.dequantise import is_quantised
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.linears import numbers_of
from moe_tools.hosts.moe_host import chosen_share
from moe_tools.measure.neurons import NeuronCount


@dataclass(frozen=True)
class Flops:
    """Matrix FLOPs per token of the text, averaged over the tokens of a run."""

    ffn_dense: float
    """FLOPs of the FFNs, with every neuron on."""
    ffn: float
    """FLOPs of the FFNs' neurons that were on, without what a router had computed of them."""
    router: float
    """FLOPs of our routers; an MoE host's own router counts as the rest."""
    attention_and_rest: float
    """With all inputs."""
    few_bit_ops: float = 0.0
    """What our routers multiply and add in whole numbers of 8 bits and fewer; in no total."""
    spared: float = 0.0
    """FLOPs outside the FFNs of inputs that thresholds drop."""
    total: float = field(init=False)
    """ffn + router + attention_and_rest - spared."""
    total_dense: float = field(init=False)
    """ffn_dense + attention_and_rest."""

    @property
    def ffn_share(self) -> float:
        """FLOPs of FFNs and our routers, over those of the dense FFNs."""
        return (self.ffn + self.router) / self.ffn_dense

    def __post_init__(self) -> None:
        rest = self.attention_and_rest
        object.__setattr__(self, "total", self.ffn + self.router + rest - self.spared)
        object.__setattr__(self, "total_dense", self.ffn_dense + rest)


@dataclass
class FlopCounter:
    """Counts FLOPs outside the FFNs, and the weights that they read."""

    others: float = 0.0
    read: int = 0
    """Numbers in weight matrices, for each call of a module."""
    passes: int = 0
    """Forward passes of the model."""

    def flops(
        self, model: PreTrainedModel, counts: list[NeuronCount], tokens: int, length: int
    ) -> Flops:
        """FLOPs per token of a run over `tokens` tokens in blocks of `length`."""
        dense = sum(2 * count.weights * count.tokens for count in counts)
        on = sum(2 * count.weights * count.on / count.neurons for count in counts)
        on += sum(2 * count.constant * count.unions[1].experts for count in counts)
        rest = self.others / tokens + attention_flops(model, length)
        scored = [(c.scoring, c.tokens, c.known(c.unions[1])) for c in counts if c.scoring]
        known = sum(scoring.known_flops * neurons for scoring, _, neurons in scored)
        router = sum(scoring.flops * seen for scoring, seen, _ in scored)
        few_bit = sum(scoring.few_bit_ops * seen for scoring, seen, _ in scored)
        parts = (dense / tokens, (on - known) / tokens, router / tokens)
        return Flops(*parts, rest, few_bit / tokens)


@contextmanager
def count_flops(model: PreTrainedModel) -> Iterator[FlopCounter]:
    """Counts the tokens that pass every weight matrix outside the FFNs and our routers.

    What the attention mask says is padding is not counted.
    """
    counter = FlopCounter()
    matrices = _other_matrices(model)
    with valid_tokens(model) as tokens:

        def hook(weights: int) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
                x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
                counter.others += 2 * weights * tokens.count(x)
                counter.read += weights

            return see

        def passed(*_: Any) -> None:
            counter.passes += 1

        handles = (
            module.register_forward_hook(hook(numbers_of(module)), with_kwargs=True)
            for module in matrices
        )
        with hooked(handles), hooked([model.register_forward_hook(passed)]):
            yield counter


def _other_matrices(model: nn.Module) -> list[nn.Module]:
    """Modules that multiply by a matrix: linears, Conv1D, the router of an MoE host."""
    routed = expert_ffns(model)
    found = [] if routed else find_ffns(model)
    parts = [ffn.part(path) for ffn in found for path in ffn.layout.parts()]
    inside = {id(module) for part in [*routed, *parts] for module in part.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside
        and not isinstance(module, nn.Embedding)
        and (is_quantised(module) or _is_matrix(module))
    ]


def _is_matrix(module: nn.Module) -> bool:
    own = module.named_parameters(recurse=False, remove_duplicate=False)
    return any(name == "weight" and parameter.ndim == 2 for name, parameter in own)


def forward_flops(model: PreTrainedModel, length: int) -> float:
    """FLOPs per token of a block of `length`, from shapes alone: all neurons on, and our routers.

    An expert of an MoE host is charged for the tokens that it sees on average. A training step
    costs three times as much: the backward pass is two products for each of the forward pass
    (arXiv 2001.08361, section 2.1).
    """
    weights = sum(
        chosen_share(model, ffn.name) * ffn.projections.numbers
        for ffn in expert_ffns(model) or find_ffns(model)
    )
    routers = sum(chosen_share(model, ffn.name) * ffn.router.flops() for ffn in expert_ffns(model))
    others = sum(map(numbers_of, _other_matrices(model)))
    return 2 * (weights + others) + routers + attention_flops(model, length)


def training_flops(model: PreTrainedModel, length: int, trained: Collection[int]) -> float:
    """FLOPs per token of a forward and a backward pass, from shapes alone.

    The gradient of a weight is a product for itself, which a frozen one does not need; the other
    product of the backward pass hands the gradient on, and is counted for every matrix.

    Args:
        model: its FFNs, with every neuron on.
        length: of a block.
        trained: ids of the parameters that get a gradient.
    """
    frozen = 0.0
    for ffn in expert_ffns(model) or find_ffns(model):
        if not _any_of(trained, ffn.projections.linears()):
            frozen += chosen_share(model, ffn.name) * ffn.projections.numbers
    for module in _other_matrices(model):
        if not _any_of(trained, [module]):
            frozen += numbers_of(module)
    return 3 * forward_flops(model, length) - 2 * frozen


def _any_of(trained: Collection[int], modules: Iterable[nn.Module]) -> bool:
    return any(id(param) in trained for module in modules for param in module.parameters())


def attention_flops(model: PreTrainedModel, length: int) -> float:
    """FLOPs of q k^T and its product with v per token, averaged over the positions of a block.

    Each costs 2 x width of q x context. A causal token sees (T + 1) / 2 tokens on average, fewer
    under a sliding window; an encoder's token sees T; a decoder beside an encoder sees both.
    """
    config = attending(model)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4 * heads * head_dim * sum(contexts(model, length))


def attending(model: PreTrainedModel) -> Any:
    """The config of all layers that attend; an encoder-decoder has both kinds in its own."""
    return model.config if model.config.is_encoder_decoder else text_config(model)


def contexts(model: PreTrainedModel, length: int) -> list[float]:
    """Mean number of tokens that a token attends to, an entry for every attention."""
    config = attending(model)
    layers = config.num_hidden_layers
    if config.is_encoder_decoder:
        return [length] * layers + [causal_context(length) + length] * decoder_layers(config)
    if not model.can_generate():
        return [length] * layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [
        causal_context(length, window if kind == "sliding_attention" else None) for kind in kinds
    ]


def decoder_layers(config: Any) -> int:
    """Layers of the decoder of an encoder-decoder, of which there are two names."""
    found = getattr(config, "num_decoder_layers", None)
    return int(config.decoder_layers if found is None else found)


def causal_context(length: int, window: int | None = None) -> float:
    """The mean of min(t, window) over the positions t = 1 ... T."""
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
