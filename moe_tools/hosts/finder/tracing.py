"""The affine modules of a model, as calls in one forward pass, and what lies between two of them.

Names and module boundaries play no part: the autograd graph says which outputs of earlier linears
reach the input of a later one, at which token and at which neuron.

Letters: N tokens of one call, F neurons, W width of a source: F, or 2F where gate and up are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]
Order = Literal["apart", "concatenated", "interleaved"]
"""How gate and up share their linears: one each (or no gate), halves of one, every other row."""

MOST_SOURCES = 4
"""More linears than any FFN reads: the walk through the graph gives up."""
PROBES = 6
"""Neurons whose slopes are looked at one by one."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an affine module."""

    path: str
    module: nn.Module
    index: int
    """How often the module had been called before."""
    x: Tensor
    out: Tensor

    @property
    def width(self) -> int:
        """Of the input."""
        return self.x.shape[-1]


@dataclass(frozen=True, eq=False)
class Passage:
    """A linear whose input is made of earlier linears' outputs, token by token."""

    down: Call
    sources: tuple[Call, ...]
    order: Order
    coupled: bool
    """A neuron's value depends on other neurons: there is no formula for one."""


Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


@contextmanager
def hooked(pairs: list[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Forward hooks for the time of a block."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def affine_calls(model: nn.Module, inputs: Inputs) -> list[Call]:
    """Runs the model once, with its graph; returns every call of a module affine in its input."""
    calls: list[Call] = []
    counts: dict[str, int] = {}

    def recorder(path: str) -> Hook:
        def record(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if not (_is_float(args[0] if args else None) and _is_float(out)):
                return out
            index = counts[path] = counts.get(path, -1) + 1
            calls.append(Call(path, module, index, args[0].clone(), out))
            return out.clone()  # the host may write into it: `out` stays what the linear gave

        return record

    weighted = [(path, module) for path, module in model.named_modules() if has_matrix(module)]
    with torch.enable_grad(), hooked([(module, recorder(path)) for path, module in weighted]):
        model(**inputs)
    first = {call.path: call for call in reversed(calls)}
    affine = {path for path, call in first.items() if _is_affine(call)}
    return [call for call in calls if call.path in affine]


def passages(calls: list[Call]) -> list[Passage]:
    """The last call of every module that is a passage, but for those that are affine in it.

    The last one: a host may run the earlier ones without a graph.
    """
    made = {call.out.grad_fn: call for call in calls if call.out.grad_fn is not None}
    last = {call.path: call for call in calls}
    found = (_passage(down, made) for down in last.values())
    return [passage for passage in found if passage is not None]


def _passage(down: Call, made: dict[Any, Call]) -> Passage | None:
    sources = _sources(down.x, made)
    try:
        return _probed(down, sources) if sources and _token_wise(down, sources) else None
    except RuntimeError:  # a host that writes into what its gradient needs: no FFN does that
        return None


def _probed(down: Call, sources: tuple[Call, ...]) -> Passage | None:
    """How neurons depend on the sources, from their slopes; None where these never change.

    ReLU neurons may be on, or off, for every token: so the sum of all is looked at, too.
    """
    neurons = down.width
    probes = sorted({i * (neurons - 1) // (PROBES - 1) for i in range(PROBES)})
    h_NF = flat(down.x)
    jacobians = [_gradients(h_NF[:, i].sum(), sources) for i in probes]
    slopes = [*jacobians, _gradients(h_NF.sum(), sources)]
    if not any(_varies(each_NW) for gradients in slopes for each_NW in gradients):
        return None
    order = _order(probes, jacobians, neurons)
    if order is not None:
        return Passage(down, sources, order, coupled=False)
    fused = len(sources) == 1 and sources[0].out.shape[-1] == 2 * neurons
    return Passage(down, sources, "concatenated" if fused else "apart", coupled=True)


def _sources(h: Tensor, made: dict[Any, Call]) -> tuple[Call, ...]:
    """The linears that h is made of; none, if it depends on anything else that is trained.

    Scalars and vectors over the neurons do not count: the constants of an activation.
    """
    sources: list[Call] = []
    seen: set[Any] = set()
    stack: list[Any] = [h.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.numel() not in (1, h.shape[-1]):
            return ()
        if (call := made.get(node)) is None:
            stack += [parent for parent, _ in node.next_functions]
            continue
        sources.append(call)
        if len(sources) > MOST_SOURCES:
            return ()
    return tuple(call for call in made.values() if call in sources)  # in the order of the pass


def _token_wise(down: Call, sources: tuple[Call, ...]) -> bool:
    """Whether h of a token reads the sources at this token only.

    The last one is asked, too: to the first, a causal mixer of tokens looks like an FFN.
    """
    h_NF = flat(down.x)
    tokens = len(h_NF)
    if tokens < 2 or any(len(flat(source.out)) != tokens for source in sources):
        return False
    for token in {tokens - 1, tokens // 2}:
        weights_F = torch.rand(h_NF.shape[-1], generator=generator_of(token)).to(h_NF) + 0.5
        for each_NW in _gradients(h_NF[token] @ weights_F, sources):
            elsewhere_NW = torch.cat([each_NW[:token], each_NW[token + 1 :]])
            if not torch.isfinite(each_NW).all() or elsewhere_NW.any():
                return False
    return True


def _order(probes: list[int], jacobians: list[list[Tensor]], neurons: int) -> Order | None:
    """How the sources' columns stand to the neurons; None: no such order, they are coupled."""
    widths = {each_NW.shape[-1] for each_NW in jacobians[0]}
    if widths == {neurons}:
        orders: tuple[Order, ...] = ("apart",)
    elif widths == {2 * neurons} and len(jacobians[0]) == 1:
        orders = ("concatenated", "interleaved")
    else:
        return None
    for order in orders:
        if all(
            _only(_columns(order, i, neurons), js) for i, js in zip(probes, jacobians, strict=True)
        ):
            return order
    return None


def _columns(order: Order, neuron: int, neurons: int) -> list[int]:
    if order == "interleaved":
        return [2 * neuron, 2 * neuron + 1]
    return [neuron] if order == "apart" else [neuron, neurons + neuron]


def _only(columns: list[int], gradients: list[Tensor]) -> bool:
    """Whether gradients are zero outside these columns."""
    for each_NW in gradients:
        outside_W = torch.ones(each_NW.shape[-1], dtype=torch.bool)
        outside_W[columns] = False
        if each_NW[:, outside_W].any():
            return False
    return True


def _varies(gradients_NW: Tensor) -> bool:
    """Whether the slopes of h change with the token: those of an affine passage do not."""
    spread_W = gradients_NW.amax(0) - gradients_NW.amin(0)
    return bool(spread_W.max() > 1e-5 * gradients_NW.abs().max())


def _gradients(value: Tensor, sources: tuple[Call, ...]) -> list[Tensor]:
    outs = [source.out for source in sources]
    gradients = torch.autograd.grad(value, outs, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, outs, strict=True)
    return [flat(torch.zeros_like(out) if each is None else each) for each, out in pairs]


def _is_affine(call: Call) -> bool:
    """By its numbers: a subclass of a linear is one, if it computes as one."""
    generator = generator_of(0)
    a, b = (torch.randn(call.x.shape, generator=generator).to(call.x) for _ in range(2))
    forward = call.module.forward  # without hooks
    try:
        with torch.no_grad():
            made = [forward(x) for x in (a + b, a, b, torch.zeros_like(a))]
    except Exception:  # a foreign module, called as it may not be: then it is no linear
        return False
    both, of_a, of_b, none = made
    if both.shape[:-1] != call.x.shape[:-1]:
        return False
    return bool((both - of_a - of_b + none).abs().max() <= 1e-5 * both.abs().max())


def has_matrix(module: nn.Module) -> bool:
    """Whether a module may be a linear."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def flat(value: Tensor) -> Tensor:
    """Tokens in one dimension."""
    return value.reshape(-1, value.shape[-1])


def generator_of(seed: int) -> torch.Generator:
    """One of our own: the global one stays as it is."""
    return torch.Generator().manual_seed(seed)
