"""Bytes of weights that a decoded token reads of a model as it is stored.

`measure.traffic` prices what a perfect kernel reads, of weights in bf16. Here the same counts are
priced as a model that is being timed keeps its weights: 4 or 2 bytes a number, 8.5 or 4.5 bits in
int8 and int4, whose scales are bf16 numbers for 32 of them each. Rows of an embedding, vectors and
the KV cache are left out there and here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.packed_ffn import PackableFFN
from moe_tools.experts.routers import Router
from moe_tools.experts.routers.base import RowReader
from moe_tools.experts.routers.few_bits import FewBitsRouter
from moe_tools.hosts.linears import numbers_of
from moe_tools.inference.packed_linear import PackedLinear
from moe_tools.kernels.few_bits import bits_each
from moe_tools.kernels.quantize import INT4
from moe_tools.measure.flops import FlopCounter
from moe_tools.measure.neurons import NeuronCount


def is_dense(model: nn.Module) -> bool:
    """Whether a model computes every neuron of its FFNs for every token."""
    return not any(isinstance(module, PackableFFN) for module in model.modules())


def token_bytes(
    model: PreTrainedModel,
    counts: Sequence[NeuronCount],
    others: FlopCounter,
    *,
    tokens: int,
    packed: torch.dtype | None = None,
) -> float:
    """Counts the bytes of a token, on average.

    Args:
        model: as it is stored and timed. A routed FFN that is not packed is read as a whole.
        counts: of its FFNs, or of those of a model that routes as it does.
        others: of everything else.
        tokens: that were seen while these counted.
        packed: in which the FFNs are packed; None: the dtype of the model.
    """
    dtype = packed or model.dtype
    named = {module.name: module for module in model.modules() if isinstance(module, PackableFFN)}
    kept = [ffn for ffn in named.values() if ffn.packed is not None]
    inside = {id(linear) for ffn in kept for linear in ffn.projections.linears()}
    bits = _linear_bits(model, inside)
    total = others.read / others.passes * bits
    for count in counts:
        ffn = named.get(count.name)
        if ffn is None or ffn.packed is None:
            total += count.weights * count.tokens / tokens * bits
        else:
            total += _rows(ffn, count) / tokens * _bits(dtype)
        if isinstance(ffn, ExpertFFN):
            total += _router_bits(ffn, count) * count.tokens / tokens
    return total / 8


def _rows(ffn: PackableFFN, count: NeuronCount) -> float:
    """Numbers of a packed FFN that the kernels read for all tokens that were counted.

    The first row of every neuron that is on; the others where the neuron is not 0. Without a router
    all neurons are on.
    """
    assert ffn.packed is not None
    parts = len(ffn.packed.weights.inputs) + 1
    on = count.on if isinstance(ffn, ExpertFFN) else count.seen
    working = on - (count.zeros or 0)
    return count.weights / count.neurons / parts * (on + (parts - 1) * working)


def _router_bits(ffn: ExpertFFN, count: NeuronCount) -> float:
    """Bits that a router reads to score a token."""
    router = ffn.router
    if isinstance(router, FewBitsRouter) and ffn.packed is not None:
        # the kernels read its copies in int4, whatever its bits, and the norms in fp32
        return count.neurons * (ffn.packed.weights.row_numbers * bits_each(4) + 32)
    if isinstance(router, RowReader):
        assert count.scoring is not None
        return count.scoring.bits
    return 8 * sum(tensor.nbytes for tensor in (*router.parameters(), *router.buffers()))


def _linear_bits(model: nn.Module, besides: set[int]) -> float:
    """Bits of a number in the linears of a model, on average; `besides` has the ids of others."""
    sizes = [
        (numbers_of(linear), _bits(_dtype(linear)))
        for linear in _linears(model)
        if id(linear) not in besides
    ]
    return sum(numbers * bits for numbers, bits in sizes) / sum(numbers for numbers, _ in sizes)


def _linears(model: nn.Module) -> Iterator[nn.Linear | Conv1D]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    inside = {id(part) for router in routers for part in router.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside:
            yield module


def _dtype(linear: nn.Linear | Conv1D) -> torch.dtype:
    return linear.packed.dtype if isinstance(linear, PackedLinear) else linear.weight.dtype


def _bits(dtype: torch.dtype) -> float:
    """Bits that a number takes, its part of a scale included."""
    stored = {torch.int8: 8, INT4: 4}
    return bits_each(stored[dtype]) if dtype in stored else 8.0 * dtype.itemsize
