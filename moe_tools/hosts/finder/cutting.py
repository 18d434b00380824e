"""Cuts FFNs off from their linears: one forward pass with random numbers in place of the outputs.

Letters: N tokens of one call, F neurons, W width of a source (F or 2F).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.hosts.finder.tracing import (
    Hook,
    Inputs,
    Passage,
    flat,
    generator_of,
    has_matrix,
    hooked,
)

LEAST_TOKENS = 3
"""Of one call, for a proof: any, the same in another order of the neurons, and its negative."""
SPREAD = 5.0
"""S.d. of the numbers that replace sources: clamps at 7 or 10 do not show below."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What a passage makes of random numbers in place of its sources' outputs."""

    sources: tuple[Tensor, ...]
    """(N, W) each."""
    h_NF: Tensor
    symmetric: bool
    """Another order of the neurons in the sources is the same order in h."""
    odd: bool
    """The negative of the sources gives the negative of h, up to a constant over two tokens."""


@dataclass(frozen=True, eq=False)
class Pointwise:
    """One call of a module that keeps the shape: an activation, maybe."""

    path: str
    x: Tensor
    out: Tensor


@torch.no_grad()
def cut(
    model: nn.Module, inputs: Inputs, found: list[Passage], seed: int
) -> tuple[dict[str, Cut], list[Pointwise]]:
    """Runs the model with random numbers in place of every source's output.

    Returns:
        For the path of each down that got enough tokens, what became of them, and every call
        of a module that keeps the shape.
    """
    outs: dict[tuple[str, int], Tensor] = {}
    inside: dict[tuple[str, int], Tensor] = {}
    pointwise: list[Pointwise] = []
    hooks: list[tuple[nn.Module, Hook]] = []
    sources = {source.path: (source, passage) for passage in found for source in passage.sources}
    for path, (source, passage) in sources.items():
        hooks.append(
            (source.module, _replacer(path, passage, outs, generator_of(seed + len(hooks))))
        )
    for passage in found:
        hooks.append((passage.down.module, _keeper(passage.down.path, inside)))
    for path, module in model.named_modules(remove_duplicate=False):  # layers may share one
        if path and not any(has_matrix(each) for each in module.modules()):
            hooks.append((module, _watcher(path, pointwise)))
    with hooked(hooks):
        model(**inputs)
    made = {p.down.path: _as_cut(p, outs, inside) for p in found}
    return {path: each for path, each in made.items() if each is not None}, pointwise


def _replacer(
    path: str, passage: Passage, outs: dict[tuple[str, int], Tensor], generator: torch.Generator
) -> Hook:
    calls = iter(range(10**9))

    def replace(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        rows_NW = SPREAD * torch.randn(flat(out).shape, generator=generator)
        first, second, third = _thirds(rows_NW)
        second.copy_(_permuted(first, passage))
        third.copy_(-first)
        key = (path, next(calls))
        outs[key] = rows_NW.to(out)
        return outs[key].view(out.shape).clone()

    return replace


def _keeper(path: str, inside: dict[tuple[str, int], Tensor]) -> Hook:
    calls = iter(range(10**9))

    def keep(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        inside[path, next(calls)] = flat(args[0]).clone()

    return keep


def _watcher(path: str, seen: list[Pointwise]) -> Hook:
    def watch(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(out, Tensor) and x.shape == out.shape:
            seen.append(Pointwise(path, flat(x).clone(), flat(out).clone()))

    return watch


def _as_cut(
    passage: Passage,
    outs: dict[tuple[str, int], Tensor],
    inside: dict[tuple[str, int], Tensor],
) -> Cut | None:
    h_NF = inside.get((passage.down.path, passage.down.index))
    sources = [outs.get((source.path, source.index)) for source in passage.sources]
    made = tuple(source for source in sources if source is not None)
    if h_NF is None or len(made) < len(sources) or len(h_NF) < LEAST_TOKENS:
        return None
    first, second, third = _thirds(h_NF)
    ordered = first[:, _neuron_order(h_NF.shape[-1])]
    symmetric = torch.allclose(second, ordered, rtol=1e-3, atol=1e-3)
    sums_NF = first + third
    constant = torch.allclose(sums_NF, sums_NF[:1].expand_as(sums_NF), rtol=1e-3, atol=1e-3)
    return Cut(made, h_NF, symmetric, odd=constant and len(sums_NF) > 1)


def _thirds(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three views of as many tokens: one, the same in another order of the neurons, and negated."""
    third = len(rows) // 3
    return rows[:third], rows[third : 2 * third], rows[2 * third : 3 * third]


def _permuted(rows_NW: Tensor, passage: Passage) -> Tensor:
    """The same tokens, with the neurons in another order."""
    neurons = passage.down.width
    order_F = _neuron_order(neurons)
    width = rows_NW.shape[-1]
    if width % neurons:
        return rows_NW
    if passage.order == "interleaved":
        return rows_NW.unflatten(-1, (neurons, -1))[:, order_F].flatten(1)
    return rows_NW.unflatten(-1, (-1, neurons))[:, :, order_F].flatten(1)


def _neuron_order(neurons: int) -> Tensor:
    return torch.randperm(neurons, generator=generator_of(neurons))
