"""What FFNs compute in a forward pass, for losses. Letters: T tokens, D model width, F neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from moe_tools.model.experts import ExpertFFN, expert_ffns
from moe_tools.model.ffn import FFN, find_ffns

Kind = Literal["outputs", "hidden", "pre"]


@dataclass
class FFNTensors:
    """Tensors of every FFN, in forward order, with their graph; those not asked for stay empty."""

    outputs: list[Tensor] = field(default_factory=list)
    """y_TD of the down projections."""
    hidden: list[Tensor] = field(default_factory=list)
    """h_TF: what enters them."""
    pre: list[Tensor] = field(default_factory=list)
    """pre_TF: what enters the activations, where the FFN itself calls them."""


@contextmanager
def watch_ffns(model: nn.Module, kinds: set[Kind]) -> Iterator[FFNTensors]:
    """Yields what grows by the asked kinds with every forward pass."""
    seen = FFNTensors()
    ffns: Sequence[ExpertFFN | FFN] = (expert_ffns(model) or find_ffns(model)) if kinds else []
    handles: list[Any] = []
    for parts in (ffn.projections for ffn in ffns):
        if "outputs" in kinds:
            handles.append(parts.down.register_forward_hook(_output(seen.outputs)))
        if "hidden" in kinds:
            handles.append(parts.down.register_forward_pre_hook(_input(seen.hidden)))
        if "pre" in kinds:  # not at the activation: experts share one, and routers call it
            source = parts.up if parts.gate is None else parts.gate
            handles.append(source.register_forward_hook(_output(seen.pre, parts.gate is parts.up)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _input(tensors: list[Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        tensors.append(args[0])

    return keep


def _output(tensors: list[Tensor], first_half: bool = False) -> Callable[..., None]:
    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        tensors.append(output.chunk(2, dim=-1)[0] if first_half else output)

    return keep
