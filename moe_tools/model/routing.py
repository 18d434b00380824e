"""What a router decided, and how to watch it. Letters: T tokens, E experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Routing(NamedTuple):
    """One decision of one FFN on one batch. Leading dimensions are the FFN input's."""

    ffn: str
    scores_TE: Tensor
    mask_TE: Tensor


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Yields a list that grows by one `Routing` an FFN a forward pass, in forward order.

    Recording changes no output and leaves nothing behind. Tensors keep their graph, so that
    losses on scores can be built from them.

    Raises:
        ValueError: the model has no routed FFN.
    """
    from moe_tools.model.experts import expert_ffns

    routed = expert_ffns(model)
    if not routed:
        raise ValueError(f"{type(model).__name__} has no routed FFN to record: convert it first")
    records: list[Routing] = []
    observe = records.append
    for ffn in routed:
        ffn.observers.append(observe)
    try:
        yield records
    finally:
        for ffn in routed:
            ffn.observers.remove(observe)
