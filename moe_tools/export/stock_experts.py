"""What a stock MoE can say about our experts: linear scores, one k, equal sizes.

Ours adds up the chosen experts, a weight of 1 each. A stock MoE weighs them by softmax or sigmoid
of the scores. Scores that are scaled down by a power of two (exact in every float) choose the same
experts and give weights that are nearly equal, 1/k each, which a factor of k makes 1. How far down
is a trade: where the choice is made after softmax or sigmoid, fp32 tells scores apart that differ
by 2.4e-7 / scale or more; and a weight is off by half of scale times its score's distance from
the mean.

In mode `weighted` the weights are the scores' own, and nothing is scaled.

Letters: D model width, F neurons of one FFN, E experts, R experts that are routed, N neurons of one
expert as it is written, S shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_tools.experts.division import Division
from moe_tools.experts.selectors import TopK, build_selector
from moe_tools.export.source import Source

Weights = Literal["equal", "sigmoid", "softmax"]
"""Of the chosen experts: 1 each, or k times their share of the scores, which are of this kind."""
HOSTS = ("llama", "mistral", "qwen2", "qwen3")
RELATIVES = "llama, mistral, qwen2 or qwen3"
WAY_OUT = (
    "`moe-tools convert --method stock_moe --model DONOR` makes a model that a stock MoE can say"
)
LINEAR = ("sigmoid", "softmax", "similarity")
"""Routers whose choice is that of a linear layer."""
NAME = "model.layers.{}.mlp"


STEP = 8
"""Neurons: transformers' product of all experts at once reads rows of whole 16 bytes."""
MANY = 128
"""Experts from which near ties are so many that the choice differs more often."""


@dataclass(frozen=True)
class StockExperts:
    """The experts of every FFN, as a stock MoE has them."""

    division: Division
    shared: int
    k: int
    """Routed experts of every token."""
    router: str
    """A name in `LINEAR`."""
    has_bias: bool
    """Whether the choice needs one."""
    weights: Weights

    @property
    def routed(self) -> int:
        """R."""
        return self.division.num_experts - self.shared

    @property
    def size(self) -> int:
        """N: smaller experts are filled up with neurons of zeros, to whole steps of `STEP`."""
        return -(-max(self.division.sizes) // STEP) * STEP

    def facts(self) -> dict[str, Any]:
        """What `--dry-run` says."""
        return {
            "experts": self.routed,
            "shared experts": self.shared,
            "neurons of an expert": self.size,
            "experts of a token": self.k,
            "weights": "1 each" if self.weights == "equal" else f"{self.weights} of the scores",
        }

    def scores(self, tensors: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor | None]:
        """weight_RD and bias_R in fp32 of the linear layer that chooses as a router does."""
        name = NAME.format(layer) + ".router"
        if self.router == "similarity":  # -|x - c|^2 orders as 2 c x - |c|^2
            rows_RD = tensors[f"{name}.rows"].float()
            return 2 * rows_RD, -rows_RD.square().sum(-1)
        weight_RD = tensors[f"{name}.weight"].float()
        return weight_RD, tensors[f"{name}.bias"].float() if self.has_bias else None

    def rows_END(self, rows_FD: Tensor) -> Tensor:
        """Rows by experts, zeros after those of smaller ones."""
        pieces = rows_FD.split(self.division.sizes)
        padded = [
            torch.nn.functional.pad(piece, (0, 0, 0, self.size - len(piece))) for piece in pieces
        ]
        return torch.stack(padded)


def plan_experts(source: Source, top_k: int | None, target: str) -> StockExperts:
    """What a stock MoE has to say about a folder.

    Args:
        source: the folder.
        top_k: routed experts of every token, in place of the folder's own selector.
        target: the format, as errors call it.

    Raises:
        ValueError: what no stock MoE can say, with the way out.
    """
    conversion, config = source.conversion, source.config
    if conversion is None or conversion.router is None:
        state = "is not converted" if conversion is None else "has no routers"
        raise ValueError(f"{source.name} {state}, and a stock MoE is written of experts: {WAY_OUT}")
    for reason in (_about_host(config, source), _about_router(source)):
        if reason is not None:
            raise ValueError(f"{target}: {source.name} {reason}")
    assert conversion.expert_size is not None
    division = conversion.divide(config.intermediate_size, "an FFN")
    routed = division.num_experts - conversion.shared_experts
    if routed < 2:
        raise ValueError(f"{target}: {source.name} routes {routed} expert, and a stock MoE two")
    options = conversion.router_options
    weights: Weights = "equal"
    if conversion.mode == "weighted":
        weights = "softmax" if conversion.router == "softmax" else "sigmoid"
    return StockExperts(
        division,
        conversion.shared_experts,
        _k(source, top_k, routed, target),
        conversion.router,
        has_bias=conversion.router != "softmax" and options.get("bias", True),
        weights=weights,
    )


def _about_host(config: Any, source: Source) -> str | None:
    """What is wrong with the host; None: nothing."""
    conversion = source.conversion
    assert conversion is not None
    if config.model_type not in HOSTS:
        return f"is a {config.model_type}, but a stock MoE is written of a {RELATIVES}: {WAY_OUT}"
    if getattr(config, "quantization_config", None) is not None:
        return (
            "is quantised, and experts are cut out of plain numbers: write plain ones by "
            "`moe_tools.save(moe_tools.load(SOURCE), FOLDER)`"
        )
    activation = conversion.activation or {"kind": config.hidden_act}
    if conversion.activation_of or activation["kind"] not in ("silu", "swish"):
        return (
            f"has the activation {activation['kind']}, where stock MoEs compute SiLU, some of them "
            "whatever the config says: convert a donor that has SiLU"
        )
    for name in ("mlp_bias", "sliding_window", "use_sliding_window"):
        value = getattr(config, name, None)
        unused = name == "sliding_window" and getattr(config, "use_sliding_window", True) is False
        if value and not unused:
            return f"has {name} {value}, which the stock MoE has not: convert another donor"
    if getattr(config, "attention_bias", False):  # of qwen2 it is none of the output, and always
        return "has attention_bias on its output, too, which the stock MoE has not"
    return None


def _about_router(source: Source) -> str | None:
    """What is wrong with routers, and with what they switch; None: nothing."""
    conversion = source.conversion
    assert conversion is not None
    if conversion.router not in LINEAR:
        return (
            f"has routers of kind {conversion.router}, which no linear layer orders alike: attach "
            f"sigmoid routers, e.g. {WAY_OUT}"
        )
    if conversion.when_off != "zero":
        return (
            f"has when_off {conversion.when_off}: no stock MoE adds anything for an expert that is "
            "off: attach with `when_off: zero`"
        )
    if conversion.constants:
        return "has constants, which no stock MoE adds: refit with `constants: false`"
    if conversion.thresholds:
        return "drops inputs of its linears, which no stock MoE does: leave out `threshold`"
    if conversion.mode not in ("hard", "straight", "weighted"):
        return f"is in mode {conversion.mode}, where every expert runs: finish its training"
    if conversion.mode == "weighted" and conversion.router == "similarity":
        return "weighs experts by scores below 0: use router sigmoid or softmax"
    if conversion.mode == "weighted" and (
        conversion.router == "sigmoid" and conversion.router_options.get("bias", True)
    ):
        return (
            "weighs experts by sigmoid(Wx + b), where a stock MoE has no b inside the sigmoid: "
            "attach with `router_options: {bias: false}`, or router softmax"
        )
    return None


def _k(source: Source, top_k: int | None, routed: int, target: str) -> int:
    """Routed experts of every token.

    Raises:
        ValueError: the selectors choose no fixed number of experts, or not one for all layers.
    """
    conversion = source.conversion
    assert conversion is not None
    if top_k is not None:
        if not 1 <= top_k <= routed:
            raise ValueError(f"--top-k {top_k}: there are {routed} routed experts: 1 to {routed}")
        return top_k
    common = conversion.selector or {}
    layers = range(source.config.num_hidden_layers)
    specs = [conversion.selector_of.get(NAME.format(layer), common) for layer in layers]
    selectors = [build_selector(spec) for spec in specs]
    way_out = (
        f"`moe-tools export {source.name} --to {target} --top-k K --output OUT` gives every token "
        f"K of the {routed} routed experts, and says what that costs"
    )
    counts = {one.count(routed) for one in selectors if isinstance(one, TopK)}
    if not all(isinstance(one, TopK) for one in selectors):
        kinds = ", ".join(sorted({spec["kind"] for spec in specs} - {"topk"}))
        raise ValueError(
            f"{target}: {source.name} has the selector {kinds}, whose number of experts depends on "
            f"the token, where a stock MoE has one k: {way_out}"
        )
    if len(counts) > 1:
        raise ValueError(
            f"{target}: {source.name} runs {min(counts)} to {max(counts)} experts, by the layer, "
            f"where a stock MoE has one k: {way_out}"
        )
    return counts.pop()


def sets_alike(experts: StockExperts) -> float:
    """The least share of token-layers in which a right file chooses as ours does."""
    return 0.97 if experts.routed >= MANY else 0.99
