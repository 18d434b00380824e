"""Tells what a conversion can do with a model: its FFNs, their share of the work, what is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moe_tools.data.limits import text_config
from moe_tools.experts.conversion import Conversion, read_conversion
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.hosts.ffn import FFN, find_ffns
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.proof import settle
from moe_tools.measure.flops import Flops, count_flops
from moe_tools.measure.neurons import count_neurons

SIZES = (4, 8, 16, 32, 64)
"""Neurons of an expert that are worth trying."""
LENGTH = 64
"""Tokens of the block that is run."""


@dataclass(frozen=True)
class Shape:
    """FFNs of equal sizes and activation."""

    count: int
    width: int
    """D: size of the FFN's input and output."""
    neurons: int
    """F: neurons of one FFN."""
    activation: str
    gated: bool
    expert_sizes: tuple[int, ...]
    """Those of `SIZES` that divide the neurons."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found out about a model."""

    host: str
    """The model's class."""
    dtype: str
    shapes: tuple[Shape, ...]
    layouts: tuple[str, ...]
    """Which parts of the host its FFNs are made of; an expert's are views of what is fused."""
    parameters: int
    """Counts a shared tensor once, and includes our routers."""
    ffn_parameters: int
    """Numbers in the FFNs' matrices."""
    flops: Flops
    """Per token, over one block of random tokens: dense figures hold for any text, except that
    the experts of an MoE host are weighed by the tokens they happened to see."""
    conversion: Conversion | None

    @property
    def ffn_parameter_share(self) -> float:
        """Share of the parameters that is in the FFNs."""
        return self.ffn_parameters / self.parameters

    @property
    def ffn_flop_share(self) -> float:
        """Share of the dense model's matrix FLOPs that the FFNs have."""
        return self.flops.ffn_dense / self.flops.total_dense


@torch.no_grad()
def diagnose(model: PreTrainedModel) -> Diagnosis:
    """Looks at a model and runs one short block of random tokens through it.

    A dense model's FFNs are proven, as before a conversion.

    Raises:
        ValueError: the model has no FFN, or one that cannot be converted.
    """
    conversion = read_conversion(model)
    settle(model)
    with count_neurons(model) as counts, count_flops(model) as others:
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(text_config(model).vocab_size, (1, LENGTH), generator=generator)
        model(**model_inputs(model, ids_BT.to(model.device)))
    ffns = expert_ffns(model) or find_ffns(model)
    shapes = [_shape(ffn) for ffn in ffns]
    return Diagnosis(
        host=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        shapes=tuple(Shape(shapes.count(shape), *shape) for shape in dict.fromkeys(shapes)),
        layouts=tuple(dict.fromkeys(ffn.layout.in_words() for ffn in ffns)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        ffn_parameters=sum(count.weights for count in counts),
        flops=others.flops(model, counts, LENGTH, LENGTH),
        conversion=conversion,
    )


def _shape(ffn: FFN | ExpertFFN) -> tuple[int, int, str, bool, tuple[int, ...]]:
    up_FD = ffn.weights().up_FD
    neurons, width = up_FD.shape
    sizes = tuple(size for size in SIZES if neurons % size == 0)
    return width, neurons, _activation(ffn), ffn.layout.gate is not None, sizes


def _activation(ffn: FFN | ExpertFFN) -> str:
    """The name of an FFN's activation: SiLU for the class SiLUActivation."""
    return type(ffn.projections.act).__name__.removesuffix("Activation")
